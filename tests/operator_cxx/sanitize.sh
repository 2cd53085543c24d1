#!/usr/bin/env bash
# Run the operators' tests under GCC's sanitizers: the CPU library for memory errors, undefined behaviour and data
# races, the emulated CUDA kernels for the first two. Each sanitizer must first report a planted error. The NumPy binding
# is tested on the same libraries. PYTHON is the interpreter, CXX the compiler.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHON=${PYTHON:-python3} PYTHONPATH=$PWD NECKLACE_OPS=compiled NECKLACE_CUDA=0 OMP_NUM_THREADS=2
export ASAN_OPTIONS=detect_leaks=0  # Python frees little memory at exit
export TSAN_OPTIONS=halt_on_error=1
compiler=${CXX:-c++}

runtime() { $compiler -print-file-name="$1"; }

# watched NAME RUNTIMES COMMAND...: run with the library in build/NAME; sanitizer runtimes have to be loaded first
watched() {
  local name=$1 runtimes=$2
  shift 2
  NECKLACE_OPS_LIBRARY=$PWD/build/$name/necklace_cpu.so LD_LIBRARY_PATH=$PWD/build/$name LD_PRELOAD=$runtimes "$@"
}

# must_find WORDS COMMAND...: require that the command fails with these words
must_find() {
  local words=$1 found
  shift
  found=$("$@" 2>&1) && { echo "the sanitizer missed the planted error: expected \"$words\", got: $found"; exit 1; }
  grep -q "$words" <<<"$found" || { echo "the sanitizer did not start: expected \"$words\", got: $found"; exit 1; }
  echo "reported the planted error: $words"
}

build() {
  local name=$1
  shift
  "$PYTHON" operator_cxx/build.py cpu --out "build/$name/necklace_cpu.so" --flag=-g --flag=-O1 "${@/#/--flag=}"
}

memory=(-fsanitize=address,undefined -fno-sanitize-recover=all)
build memory "${memory[@]}"
runtimes="$(runtime libasan.so) $(runtime libstdc++.so)"
must_find heap-buffer-overflow watched memory "$runtimes" "$PYTHON" tests/operator_cxx/planted_error.py read
# The tests build the emulated kernels, with this CXX. AddressSanitizer does not support fibers that change threads.
CXX="$compiler ${memory[*]} -g -O1" watched memory "$runtimes" \
  "$PYTHON" -m pytest --capture=sys tests/operator_cxx -k "not reference and not (emulated and thread)" \
  --ignore tests/operator_cxx/test_build.py

build races -fsanitize=thread
# without address space randomisation, which can collide with ThreadSanitizer's shadow memory
races() { watched races "$(runtime libtsan.so)" setarch -R "$@"; }
must_find "data race" races "$PYTHON" tests/operator_cxx/planted_error.py race
races "$PYTHON" -m pytest --capture=sys tests/operator_cxx -k "not reference and not emulated and thread" \
  --ignore tests/operator_cxx/test_build.py
