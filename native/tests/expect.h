/* expect(condition): a test says what it expected, where, and ends. */
#ifndef TRM_EXPECT_H
#define TRM_EXPECT_H

#include <stdio.h>
#include <stdlib.h>

#define expect(condition)                                                                                        \
    do {                                                                                                         \
        if (!(condition)) {                                                                                      \
            fprintf(stderr, "%s:%d: expected %s\n", __FILE__, __LINE__, #condition);                             \
            exit(1);                                                                                             \
        }                                                                                                        \
    } while (0)

#endif
