# SPDX-License-Identifier: Apache-2.0
# For 64-bit ARM Linux: with Debian's cross compiler (g++-aarch64-linux-gnu) on the PATH, or with the one that
# `turbopocket arm64 setup` unpacked: -DCROSS_ROOT=<cache>/trees/host, and its programs and libraries in the environment.
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
if(CROSS_ROOT)
  set(CMAKE_CXX_COMPILER ${CROSS_ROOT}/usr/bin/aarch64-linux-gnu-g++)
  set(CMAKE_SYSROOT ${CROSS_ROOT})
endif()
list(APPEND CMAKE_TRY_COMPILE_PLATFORM_VARIABLES CROSS_ROOT)
