# What ctest runs: no test needs a GPU.
enable_testing()
include(CheckLanguage)
include(CheckCSourceCompiles)
set(tests ${CMAKE_SOURCE_DIR}/native/tests)

function(trm_test name source)
  add_executable(${name} ${tests}/${source})
  target_compile_options(${name} PRIVATE ${warnings})
  add_test(NAME ${name} COMMAND ${name} ${ARGN})
endfunction()

# the reader of files from anybody, watched by sanitizers where the compiler has them
trm_test(test_safetensors test_safetensors.c)
target_sources(test_safetensors PRIVATE ${CMAKE_SOURCE_DIR}/native/src/safetensors.c
  ${CMAKE_SOURCE_DIR}/native/src/error.c ${CMAKE_SOURCE_DIR}/native/src/convert.c)
target_include_directories(test_safetensors PRIVATE ${CMAKE_SOURCE_DIR}/native/src
  ${CMAKE_SOURCE_DIR}/native/include)
target_link_libraries(test_safetensors PRIVATE m)
set(CMAKE_REQUIRED_FLAGS "-fsanitize=address,undefined")
check_c_source_compiles("int main(void) { return 0; }" TRM_HAS_SANITIZERS)
unset(CMAKE_REQUIRED_FLAGS)
function(trm_watch name)
  if(TRM_HAS_SANITIZERS)
    target_compile_options(${name} PRIVATE -g -fsanitize=address,undefined -fno-sanitize-recover=all)
    target_link_options(${name} PRIVATE -fsanitize=address,undefined)
  endif()
endfunction()
trm_watch(test_safetensors)

# a model's whole life, on a driver that only looks: the same sources, watched as well
add_library(fake_cuda SHARED ${tests}/fake_cuda.c)
set_target_properties(fake_cuda PROPERTIES OUTPUT_NAME cuda SUFFIX .so.1
  LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/fake)
target_include_directories(fake_cuda SYSTEM PRIVATE ${TRM_CUDA_INCLUDE})
target_compile_options(fake_cuda PRIVATE ${warnings})
trm_test(test_model test_model.c)
target_sources(test_model PRIVATE ${sources} ${index} ${generated})
target_include_directories(test_model PRIVATE ${CMAKE_SOURCE_DIR}/native/src ${CMAKE_SOURCE_DIR}/native/include)
target_include_directories(test_model SYSTEM PRIVATE ${TRM_CUDA_INCLUDE})
target_compile_definitions(test_model PRIVATE TRM_VERSION="${PROJECT_VERSION}")
target_link_libraries(test_model PRIVATE ${CMAKE_DL_LIBS} m)
trm_watch(test_model)
trm_watch(fake_cuda)
add_dependencies(test_model trm_kernels fake_cuda)
set_tests_properties(test_model PROPERTIES ENVIRONMENT "LD_LIBRARY_PATH=${CMAKE_BINARY_DIR}/fake")

trm_test(test_library test_library.c ${TRM_ARCHS})
target_link_libraries(test_library PRIVATE trm_kernels)

check_language(CXX)
if(CMAKE_CXX_COMPILER)
  enable_language(CXX)
  trm_test(test_header test_header.cpp)
  target_link_libraries(test_header PRIVATE trm_kernels)
endif()
