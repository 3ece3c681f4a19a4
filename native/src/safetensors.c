#define _FILE_OFFSET_BITS 64
#define _POSIX_C_SOURCE 200809L
#include "safetensors.h"

#include <fcntl.h>
#include <inttypes.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "error.h"

#define MAX_HEADER (100u << 20)

/* The header while it is read. The first error is kept, and ends everything. */
typedef struct parser {
    const char *at, *end;
    const char *path;
    trm_error *error;
    trm_status status;
} parser;

static int refuse(parser *p, const char *why) {
    if (p->status == TRM_OK) {
        p->status = trm_fail(p->error, TRM_ERROR_FILE, "%s: expected a safetensors file, got %s", p->path, why);
    }
    return 0;
}

static void skip_spaces(parser *p) {
    while (p->at < p->end && (*p->at == ' ' || *p->at == '\n' || *p->at == '\r' || *p->at == '\t')) {
        p->at++;
    }
}

static int next_is(parser *p, char wanted) {
    skip_spaces(p);
    return p->at < p->end && *p->at == wanted;
}

static int take(parser *p, char wanted) {
    if (!next_is(p, wanted)) {
        char why[64];
        snprintf(why, sizeof why, "a header without an expected '%c'", wanted);
        return refuse(p, why);
    }
    p->at++;
    return 1;
}

static int hex_digit(char c) {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'a' && c <= 'f') return c - 'a' + 10;
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    return -1;
}

/* The character of \uXXXX as UTF-8; returns its bytes, 0 for one that is refused. */
static int unicode_escape(parser *p, char *out) {
    unsigned code = 0;
    if (p->end - p->at < 4) return 0;
    for (int i = 0; i < 4; i++) {
        int digit = hex_digit(*p->at++);
        if (digit < 0) return 0;
        code = code << 4 | (unsigned)digit;
    }
    if (code == 0 || (code >= 0xD800 && code < 0xE000)) return 0; /* ends a C string; half a character */
    if (code < 0x80) {
        out[0] = (char)code;
        return 1;
    }
    if (code < 0x800) {
        out[0] = (char)(0xC0 | code >> 6);
        out[1] = (char)(0x80 | (code & 0x3F));
        return 2;
    }
    out[0] = (char)(0xE0 | code >> 12);
    out[1] = (char)(0x80 | (code >> 6 & 0x3F));
    out[2] = (char)(0x80 | (code & 0x3F));
    return 3;
}

/* One character of a string after a backslash; returns its bytes. */
static int escape(parser *p, char *out) {
    static const char from[] = "\"\\/bfnrt", to[] = "\"\\/\b\f\n\r\t";
    if (p->at == p->end) return 0;
    char c = *p->at++;
    if (c == 'u') return unicode_escape(p, out);
    const char *found = c ? strchr(from, c) : NULL;
    if (!found) return 0;
    *out = to[found - from];
    return 1;
}

/* A string, to be freed; NULL after an error. What is unescaped is never longer than what was escaped. */
static char *take_string(parser *p) {
    if (!take(p, '"')) return NULL;
    const char *close = p->at;
    while (close < p->end && *close != '"') {
        close += *close == '\\' ? 2 : 1;
    }
    if (close >= p->end) {
        refuse(p, "a header with a string that does not end");
        return NULL;
    }
    char *text = malloc((size_t)(close - p->at) + 1), *out = text;
    if (!text) {
        p->status = trm_fail(p->error, TRM_ERROR_MEMORY, "%s: no memory for its header", p->path);
        return NULL;
    }
    while (p->at < close) {
        int bytes = 1;
        if (*p->at == '\\') {
            p->at++;
            bytes = escape(p, out);
        } else {
            *out = *p->at++;
            if ((unsigned char)*out < 0x20) bytes = 0;
        }
        if (!bytes) {
            free(text);
            refuse(p, "a header with a string that is no JSON");
            return NULL;
        }
        out += bytes;
    }
    p->at++;
    *out = 0;
    return text;
}

static int take_number(parser *p, uint64_t *number) {
    skip_spaces(p);
    const char *start = p->at;
    *number = 0;
    for (; p->at < p->end && *p->at >= '0' && *p->at <= '9'; p->at++) {
        if (__builtin_mul_overflow(*number, 10u, number) ||
            __builtin_add_overflow(*number, (uint64_t)(*p->at - '0'), number)) {
            return refuse(p, "a header with a number beyond 64 bits");
        }
    }
    if (p->at == start) return refuse(p, "a header with something else where a whole number belongs");
    if (*start == '0' && p->at - start > 1) return refuse(p, "a header with a number that begins with 0");
    return 1;
}

/* [n, n, ...] of at most `room` numbers; returns how many, or -1. */
static int take_numbers(parser *p, uint64_t *numbers, int room) {
    int count = 0;
    if (!take(p, '[')) return -1;
    if (next_is(p, ']')) {
        p->at++;
        return 0;
    }
    do {
        if (count == room) {
            refuse(p, "a header with a list that is too long");
            return -1;
        }
        if (!take_number(p, &numbers[count++])) return -1;
    } while (next_is(p, ',') && p->at++);
    return take(p, ']') ? count : -1;
}

static int take_dtype(parser *p, trm_tensor *tensor) {
    char *dtype = take_string(p);
    if (!dtype) return 0;
    int fits = strlen(dtype) < sizeof tensor->dtype;
    if (fits) strcpy(tensor->dtype, dtype);
    free(dtype);
    return fits || refuse(p, "a header with a dtype that nobody has");
}

/* One of dtype, shape and data_offsets; `seen` has a bit for each that came. */
static int take_field(parser *p, trm_tensor *tensor, unsigned *seen) {
    uint64_t offsets[2];
    char *key = take_string(p);
    if (!key) return 0;
    unsigned bit = !strcmp(key, "dtype") ? 1 : !strcmp(key, "shape") ? 2 : !strcmp(key, "data_offsets") ? 4 : 0;
    free(key);
    if (!bit || *seen & bit) return refuse(p, "a header with a tensor that has something else, or twice");
    *seen |= bit;
    if (!take(p, ':')) return 0;
    if (bit == 1) return take_dtype(p, tensor);
    if (bit == 2) {
        tensor->num_dimensions = take_numbers(p, tensor->shape, TRM_MAX_DIMENSIONS);
        return tensor->num_dimensions >= 0;
    }
    int count = take_numbers(p, offsets, 2);
    if (count < 0) return 0;
    if (count != 2) return refuse(p, "a header with data_offsets that are not two numbers");
    tensor->begin = offsets[0];
    tensor->end = offsets[1];
    return 1;
}

static int take_tensor(parser *p, trm_tensor *tensor) {
    unsigned seen = 0;
    if (!take(p, '{')) return 0;
    do {
        if (!take_field(p, tensor, &seen)) return 0;
    } while (next_is(p, ',') && p->at++);
    if (seen != 7) return refuse(p, "a header with a tensor without dtype, shape or data_offsets");
    return take(p, '}');
}

/* {"key": "value", ...}, which nobody reads */
static int skip_metadata(parser *p) {
    if (!take(p, '{')) return 0;
    if (next_is(p, '}')) {
        p->at++;
        return 1;
    }
    do {
        char *key = take_string(p);
        free(key);
        if (!key || !take(p, ':')) return 0;
        char *value = take_string(p);
        free(value);
        if (!value) return 0;
    } while (next_is(p, ',') && p->at++);
    return take(p, '}');
}

static trm_tensor *one_more(parser *p, trm_safetensors *opened, size_t *room) {
    if (opened->count == *room) {
        size_t more = *room ? 2 * *room : 64;
        trm_tensor *grown = realloc(opened->tensors, more * sizeof *grown);
        if (!grown) {
            p->status = trm_fail(p->error, TRM_ERROR_MEMORY, "%s: no memory for its header", p->path);
            return NULL;
        }
        opened->tensors = grown;
        *room = more;
    }
    trm_tensor *tensor = &opened->tensors[opened->count];
    memset(tensor, 0, sizeof *tensor);
    return tensor;
}

static int take_entry(parser *p, trm_safetensors *opened, size_t *room) {
    char *name = take_string(p);
    if (!name) return 0;
    if (!take(p, ':')) {
        free(name);
        return 0;
    }
    if (!strcmp(name, "__metadata__")) {
        free(name);
        return skip_metadata(p);
    }
    trm_tensor *tensor = one_more(p, opened, room);
    if (!tensor) {
        free(name);
        return 0;
    }
    tensor->name = name;
    opened->count++; /* from here on, closing frees the name */
    return take_tensor(p, tensor);
}

static int take_header(parser *p, trm_safetensors *opened) {
    size_t room = 0;
    if (p->at == p->end || *p->at != '{') return refuse(p, "a header that does not begin with '{'");
    p->at++;
    if (next_is(p, '}')) {
        p->at++;
    } else {
        do {
            if (!take_entry(p, opened, &room)) return 0;
        } while (next_is(p, ',') && p->at++);
        if (!take(p, '}')) return 0;
    }
    skip_spaces(p);
    return p->at == p->end || refuse(p, "a header with something after its end");
}

static uint64_t element_size(const char *dtype) {
    static const struct {
        const char *name;
        uint64_t size;
    } known[] = {{"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"I16", 2}, {"U16", 2}, {"F16", 2},
                 {"BF16", 2}, {"I32", 4}, {"U32", 4}, {"F32", 4},     {"I64", 8},     {"U64", 8}, {"F64", 8}};
    for (size_t i = 0; i < sizeof known / sizeof *known; i++) {
        if (!strcmp(dtype, known[i].name)) return known[i].size;
    }
    return 0;
}

static int check_size(parser *p, const trm_tensor *tensor) {
    uint64_t bytes = element_size(tensor->dtype);
    if (!bytes) return refuse(p, "a tensor of an unknown dtype");
    for (int i = 0; i < tensor->num_dimensions; i++) {
        if (__builtin_mul_overflow(bytes, tensor->shape[i], &bytes)) return refuse(p, "a shape beyond 64 bits");
    }
    if (tensor->end < tensor->begin || tensor->end - tensor->begin != bytes) {
        return refuse(p, "a tensor whose shape and offsets disagree");
    }
    return 1;
}

static int by_place(const void *a, const void *b) {
    const trm_tensor *s = a, *t = b;
    if (s->begin != t->begin) return s->begin < t->begin ? -1 : 1;
    return s->end < t->end ? -1 : s->end > t->end;
}

static int by_name(const void *a, const void *b) {
    return strcmp(((const trm_tensor *)a)->name, ((const trm_tensor *)b)->name);
}

/* Every byte belongs to one tensor, every name too. Leaves the tensors sorted by name. */
static int check_tensors(parser *p, trm_safetensors *opened, uint64_t data) {
    uint64_t end = 0;
    if (opened->count) qsort(opened->tensors, opened->count, sizeof *opened->tensors, by_place);
    for (size_t i = 0; i < opened->count; i++) {
        const trm_tensor *tensor = &opened->tensors[i];
        if (!check_size(p, tensor)) return 0;
        if (tensor->begin < end) return refuse(p, "tensors that overlap");
        if (tensor->begin > end) return refuse(p, "tensors with a hole between them");
        end = tensor->end;
    }
    if (end > data) return refuse(p, "a tensor that ends beyond the file");
    if (end < data) return refuse(p, "bytes that belong to no tensor");
    if (opened->count) qsort(opened->tensors, opened->count, sizeof *opened->tensors, by_name);
    for (size_t i = 1; i < opened->count; i++) {
        if (!by_name(&opened->tensors[i - 1], &opened->tensors[i])) return refuse(p, "two tensors of one name");
    }
    return 1;
}

/* Bytes of the character at `at`, 0 where there is none: RFC 3629, the shortest form and no surrogates. */
static int utf8_bytes(const unsigned char *at, const unsigned char *end) {
    static const unsigned least[] = {0, 0, 0x80, 0x800, 0x10000};
    if (*at < 0x80) return 1;
    int bytes = *at >= 0xF0 ? 4 : *at >= 0xE0 ? 3 : 2;
    if (*at < 0xC2 || *at > 0xF4 || end - at < bytes) return 0;
    unsigned code = *at & (0xFFu >> (bytes + 1));
    for (int i = 1; i < bytes; i++) {
        if ((at[i] & 0xC0) != 0x80) return 0;
        code = code << 6 | (at[i] & 0x3Fu);
    }
    return code >= least[bytes] && code <= 0x10FFFF && (code < 0xD800 || code > 0xDFFF) ? bytes : 0;
}

static int check_utf8(parser *p) {
    const unsigned char *at = (const unsigned char *)p->at, *end = (const unsigned char *)p->end;
    while (at < end) {
        int bytes = utf8_bytes(at, end);
        if (!bytes) return refuse(p, "a header that is not UTF-8");
        at += bytes;
    }
    return 1;
}

/* The header's length, 0 after an error; `size` is the file's. */
static uint64_t header_length(parser *p, FILE *file, uint64_t *size) {
    unsigned char bytes[8];
    off_t end = fseeko(file, 0, SEEK_END) ? -1 : ftello(file);
    if (end < 0 || fseeko(file, 0, SEEK_SET) || fread(bytes, 1, 8, file) != 8) {
        return (uint64_t)refuse(p, "one that is too short, or cannot be read");
    }
    *size = (uint64_t)end;
    uint64_t length = 0;
    for (int i = 7; i >= 0; i--) length = length << 8 | bytes[i];
    if (length > MAX_HEADER) return (uint64_t)refuse(p, "a header of more than 100 MB");
    if (*size < 8 || length > *size - 8) return (uint64_t)refuse(p, "a header that is longer than the file");
    if (length < 2) return (uint64_t)refuse(p, "no header");
    return length;
}

static int read_header(parser *p, trm_safetensors *opened) {
    uint64_t size = 0, length = header_length(p, opened->file, &size);
    if (!length) return 0;
    char *header = malloc((size_t)length + 1); /* looking past an escape may point at the one more */
    if (!header) {
        p->status = trm_fail(p->error, TRM_ERROR_MEMORY, "%s: no memory for its header", p->path);
        return 0;
    }
    opened->first = 8 + length;
    p->at = header;
    p->end = header + length;
    int is_sound = fread(header, 1, (size_t)length, opened->file) == length || refuse(p, "one that cannot be read");
    is_sound = is_sound && check_utf8(p) && take_header(p, opened) && check_tensors(p, opened, size - opened->first);
    free(header);
    return is_sound;
}

trm_status trm_safetensors_open(trm_safetensors *opened, const char *path, trm_error *error) {
    parser p = {NULL, NULL, path, error, TRM_OK};
    memset(opened, 0, sizeof *opened);
    struct stat facts;
    int descriptor = open(path, O_RDONLY | O_NONBLOCK | O_CLOEXEC); /* a FIFO would wait for somebody to write */
    if (descriptor < 0) return trm_fail(error, TRM_ERROR_FILE, "%s: cannot be opened", path);
    int is_regular = !fstat(descriptor, &facts) && S_ISREG(facts.st_mode);
    if (is_regular) opened->file = fdopen(descriptor, "rb");
    if (!opened->file) {
        close(descriptor);
        const char *why = is_regular ? "cannot be opened" : "expected a safetensors file, got no regular file";
        return trm_fail(error, TRM_ERROR_FILE, "%s: %s", path, why);
    }
    if (!read_header(&p, opened)) trm_safetensors_close(opened);
    return p.status;
}

void trm_safetensors_close(trm_safetensors *opened) {
    for (size_t i = 0; i < opened->count; i++) free(opened->tensors[i].name);
    free(opened->tensors);
    if (opened->file) fclose(opened->file);
    memset(opened, 0, sizeof *opened);
}

const trm_tensor *trm_safetensors_find(const trm_safetensors *opened, const char *name) {
    trm_tensor wanted = {.name = (char *)name};
    if (!opened->count) return NULL;
    return bsearch(&wanted, opened->tensors, opened->count, sizeof wanted, by_name);
}

trm_status trm_safetensors_read(const trm_safetensors *opened, const trm_tensor *tensor, void *bytes,
                                trm_error *error) {
    size_t count = (size_t)(tensor->end - tensor->begin);
    if (fseeko(opened->file, (off_t)(opened->first + tensor->begin), SEEK_SET) ||
        fread(bytes, 1, count, opened->file) != count) {
        return trm_fail(error, TRM_ERROR_FILE, "%s: its bytes cannot be read", tensor->name);
    }
    return TRM_OK;
}
