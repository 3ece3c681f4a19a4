#define _POSIX_C_SOURCE 200809L
/* Sound files are read, and whatever else comes is refused; run under the address sanitizer. */
#include "safetensors.h"

#include <math.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "convert.h"
#include "expect.h"

static char path[] = "trm-safetensors-XXXXXX";

static void write_file(const void *bytes, size_t count) {
    FILE *file = fopen(path, "wb");
    expect(file && fwrite(bytes, 1, count, file) == count);
    fclose(file);
}

/* A file of this header, `data` bytes of tensors, and a length that may be a lie; returns its size. */
static size_t build(char *bytes, uint64_t length, const char *header, size_t data) {
    size_t size = 8 + strlen(header);
    for (int i = 0; i < 8; i++) bytes[i] = (char)(length >> 8 * i & 0xFF);
    memcpy(bytes + 8, header, strlen(header));
    for (size_t i = 0; i < data; i++) bytes[size + i] = (char)i;
    return size + data;
}

static trm_status open_bytes(const char *bytes, size_t count, trm_error *error) {
    trm_safetensors opened;
    write_file(bytes, count);
    trm_status status = trm_safetensors_open(&opened, path, error);
    if (status == TRM_OK) trm_safetensors_close(&opened);
    return status;
}

static void refuse_with_length(uint64_t length, const char *header, size_t data, const char *why) {
    static char bytes[4096];
    trm_error error = {TRM_OK, ""};
    trm_status status = open_bytes(bytes, build(bytes, length, header, data), &error);
    if (status != TRM_ERROR_FILE || !strstr(error.message, why)) fprintf(stderr, "%s: %s\n", header, error.message);
    expect(status == TRM_ERROR_FILE);
    expect(strstr(error.message, why));
}

static void refuse(const char *header, size_t data, const char *why) {
    refuse_with_length(strlen(header), header, data, why);
}

static const char sound[] = "{\"__metadata__\":{\"format\":\"pt\"},"
                            "\"b\":{\"dtype\":\"F32\",\"shape\":[2,3],\"data_offsets\":[4,28]},"
                            "\"a\\u00e9\\n\" : { \"shape\" : [2], \"dtype\":\"BF16\", \"data_offsets\":[0,4]},"
                            "\"none\":{\"dtype\":\"I64\",\"shape\":[0,7],\"data_offsets\":[28,28]}}   ";

static void a_sound_file_is_read(void) {
    static char bytes[4096];
    trm_safetensors opened;
    trm_error error;
    unsigned char read[24];
    write_file(bytes, build(bytes, strlen(sound), sound, 28));
    expect(trm_safetensors_open(&opened, path, &error) == TRM_OK);
    expect(opened.count == 3);
    const trm_tensor *b = trm_safetensors_find(&opened, "b");
    expect(b && !strcmp(b->dtype, "F32") && b->num_dimensions == 2 && b->shape[0] == 2 && b->shape[1] == 3);
    expect(trm_safetensors_read(&opened, b, read, &error) == TRM_OK);
    expect(read[0] == 4 && read[23] == 27);
    expect(trm_safetensors_find(&opened, "a\xc3\xa9\n"));
    expect(!trm_safetensors_find(&opened, "c") && !trm_safetensors_find(&opened, "__metadata__"));
    trm_safetensors_close(&opened);
    expect(open_bytes(bytes, build(bytes, 2, "{}", 0), &error) == TRM_OK);
}

static void a_file_cut_short_is_refused(void) {
    static char bytes[4096];
    size_t size = build(bytes, strlen(sound), sound, 28);
    for (size_t count = 0; count < size; count++) expect(open_bytes(bytes, count, NULL) == TRM_ERROR_FILE);
}

/* Any byte may be any other: the answer is yes or no, never a crash. */
static void a_damaged_file_does_no_harm(void) {
    static char bytes[4096];
    size_t size = build(bytes, strlen(sound), sound, 28);
    uint32_t random = 1;
    for (int i = 0; i < 400; i++) {
        random = random * 1664525 + 1013904223;
        size_t where = (random >> 8) % (size - 28);
        char before = bytes[where];
        bytes[where] = (char)(random >> 24);
        trm_status status = open_bytes(bytes, size, NULL);
        expect(status == TRM_OK || status == TRM_ERROR_FILE);
        bytes[where] = before;
    }
}

#define ONE(name, dtype, shape, offsets)                                                                         \
    "\"" name "\":{\"dtype\":\"" dtype "\",\"shape\":" shape ",\"data_offsets\":" offsets "}"

static void lies_are_refused(void) {
    refuse_with_length(0, "{}", 0, "no header");
    refuse_with_length(100, "{}", 0, "longer than the file");
    refuse_with_length(UINT64_MAX, "{}", 0, "100 MB");
    refuse_with_length((100u << 20) + 1, "{}", 0, "100 MB");
    refuse("{" ONE("a", "F32", "[2]", "[0,8]") "}", 7, "beyond the file");
    refuse("{" ONE("a", "F32", "[2]", "[0,8]") "}", 9, "belong to no tensor");
    refuse("{" ONE("a", "F32", "[2]", "[8,0]") "}", 8, "disagree");
    refuse("{" ONE("a", "F32", "[3]", "[0,8]") "}", 8, "disagree");
    refuse("{" ONE("a", "F32", "[2]", "[0,8]") "," ONE("b", "F32", "[1]", "[4,8]") "}", 8, "overlap");
    refuse("{" ONE("a", "F32", "[1]", "[0,4]") "," ONE("b", "F32", "[1]", "[8,12]") "}", 12, "hole");
    refuse("{" ONE("a", "F32", "[1]", "[0,4]") "," ONE("a", "F32", "[1]", "[4,8]") "}", 8, "one name");
    refuse("{" ONE("a", "F32", "[4611686018427387904,4]", "[0,0]") "}", 0, "beyond 64 bits");
    refuse("{" ONE("a", "F32", "[18446744073709551616]", "[0,0]") "}", 0, "beyond 64 bits");
    refuse("{" ONE("a", "F32", "[18446744073709551615]", "[0,18446744073709551612]") "}", 0, "64 bits");
    refuse("{" ONE("a", "F32", "[1,1,1,1,1,1,1,1,1]", "[0,4]") "}", 4, "too long");
    refuse("{" ONE("a", "F4", "[2]", "[0,1]") "}", 1, "unknown dtype");
    refuse("{" ONE("a", "AVERYLONGDTYPENAME", "[2]", "[0,1]") "}", 1, "dtype");
    refuse("{" ONE("a", "F32", "[2]", "[0]") "}", 8, "two numbers");
    refuse("{" ONE("a", "F32", "[2]", "[0,8,9]") "}", 8, "too long");
    refuse("{" ONE("a", "F32", "[-2]", "[0,8]") "}", 8, "whole number");
    refuse("{" ONE("a", "F32", "[2.0]", "[0,8]") "}", 8, "']'");
    refuse("{" ONE("a", "F32", "[02]", "[0,8]") "}", 8, "begins with 0");
    refuse("{" ONE("a", "F32", "[2]", "[0,8]") "}x", 8, "after its end");
    refuse("{" ONE("a\\ud800", "F32", "[2]", "[0,8]") "}", 8, "no JSON");
    refuse("{" ONE("a\\u0000", "F32", "[2]", "[0,8]") "}", 8, "no JSON");
    refuse("{" ONE("a\\x", "F32", "[2]", "[0,8]") "}", 8, "no JSON");
    refuse("{\"a\":{\"dtype\":\"F32\",\"shape\":[2]}}", 8, "without");
    refuse("{\"a\":{\"dtype\":\"F32\",\"dtype\":\"F32\"}}", 8, "twice");
    refuse("{\"a\":{\"kind\":\"F32\"}}", 8, "something else");
    refuse("{\"a\":[[[[[[[[[[[[[[[[[[[[[[", 8, "'{'");
    refuse("{\"a", 8, "does not end");
    refuse("{\"a\\\"", 0, "does not end");
    refuse("{\"a\\", 0, "does not end");
    refuse("[]", 0, "'{'");
    refuse("{\"__metadata__\":{\"a\":{}}}", 0, "'\"'");
}

/* A name is UTF-8, as in every other reader: these begin right and end otherwise. */
static void names_that_are_not_utf8_are_refused(void) {
    static const char *const wrong[] = {
        "\xff",     "\x80",         "\xc3",             "\xc3(",            "\xc0\xaf",        "\xe0\x80\xaf",
        "\xe2\x82", "\xed\xa0\x80", "\xf0\x80\x80\xaf", "\xf4\x90\x80\x80", "\xf5\x80\x80\x80"};
    static const char *const right[] = {"\xc3\xa9", "\xe2\x82\xac", "\xed\x9f\xbf", "\xf0\x9f\x98\x80",
                                        "\xf4\x8f\xbf\xbf"};
    static const char one[] = "{\"a%s\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}";
    static char header[256], bytes[512];
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        snprintf(header, sizeof header, one, wrong[i]);
        refuse(header, 8, "not UTF-8");
        snprintf(header, sizeof header, "{\"__metadata__\":{\"a\":\"%s\"}}", wrong[i]);
        refuse(header, 0, "not UTF-8");
    }
    for (size_t i = 0; i < sizeof right / sizeof *right; i++) {
        snprintf(header, sizeof header, one, right[i]);
        expect(open_bytes(bytes, build(bytes, strlen(header), header, 8), NULL) == TRM_OK);
    }
}

static void refuse_path(const char *other, const char *why) {
    trm_safetensors opened;
    trm_error error = {TRM_OK, ""};
    expect(trm_safetensors_open(&opened, other, &error) == TRM_ERROR_FILE);
    expect(strstr(error.message, other) && strstr(error.message, why));
}

/* Nobody writes into this FIFO: opening it has to come back. */
static void what_is_no_regular_file_is_refused(void) {
    char fifo[64];
    snprintf(fifo, sizeof fifo, "%s.fifo", path);
    expect(!mkfifo(fifo, 0600));
    refuse_path(fifo, "no regular file");
    unlink(fifo);
    refuse_path(".", "no regular file");
    refuse_path("/dev/zero", "no regular file");
    refuse_path("there-is-no-such-file", "cannot be opened");
}

static void weights_are_cast_to_the_nearest(void) {
    const float from[] = {1.0f,       1.00390625f, 1.01171875f, -65519.0f, 65520.0f,
                          0x1p-24f,   0x1p-25f,    0x1.8p-24f,  INFINITY,  0x1.ffep-15f};
    const uint16_t bfloat[] = {0x3F80, 0x3F80, 0x3F82, 0xC780, 0x4780, 0x3380, 0x3300, 0x33C0, 0x7F80, 0x3880};
    const uint16_t half[] = {0x3C00, 0x3C04, 0x3C0C, 0xFBFF, 0x7C00, 0x0001, 0x0000, 0x0002, 0x7C00, 0x0400};
    uint16_t to[10];
    trm_convert(to, TRM_BFLOAT16, from, TRM_FLOAT32, 10);
    expect(!memcmp(to, bfloat, sizeof to));
    trm_convert(to, TRM_FLOAT16, from, TRM_FLOAT32, 10);
    expect(!memcmp(to, half, sizeof to));
    for (uint32_t bits = 0; bits < 0x10000; bits++) { /* there and back */
        uint16_t before = (uint16_t)bits, after;
        float between;
        trm_convert(&between, TRM_FLOAT32, &before, TRM_FLOAT16, 1);
        trm_convert(&after, TRM_FLOAT16, &between, TRM_FLOAT32, 1);
        expect(before == after || isnan(between));
        trm_convert(&between, TRM_FLOAT32, &before, TRM_BFLOAT16, 1);
        trm_convert(&after, TRM_BFLOAT16, &between, TRM_FLOAT32, 1);
        expect(before == after || isnan(between));
    }
}

int main(void) {
    int file = mkstemp(path);
    expect(file >= 0);
    close(file);
    a_sound_file_is_read();
    a_file_cut_short_is_refused();
    a_damaged_file_does_no_harm();
    lies_are_refused();
    names_that_are_not_utf8_are_refused();
    what_is_no_regular_file_is_refused();
    weights_are_cast_to_the_nearest();
    unlink(path);
    return 0;
}
