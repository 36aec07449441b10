#!/usr/bin/env bash
# Short property run with the extensions under AddressSanitizer and UndefinedBehaviorSanitizer, in a copy of the tree.
#   tools/sanitize.sh PYTHON [pytest arguments]      PYTHON: an interpreter with the [test] extra installed
set -euo pipefail
cd "$(dirname "$0")/.."
python=$(realpath -s "$1"); shift
copy=build/sanitize
[ $# -gt 0 ] || set -- tests/property tests/stateful
mkdir -p "$copy"
# What git knows or would add: sources as they are now, without anything built.
git ls-files -z --cached --others --exclude-standard | tar --null --ignore-failed-read -T - -cf - | tar -xf - -C "$copy"
cd "$copy"
VFIODMA_SANITIZE=address,undefined "$python" setup.py -q build_ext --inplace
# The runtime must be the first library of an interpreter that was built without it.  Its allocator replaces Python's arenas,
# or small objects would hide overflows.  Python itself frees too little at exit for leak reports to mean anything.
export LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)"
export PYTHONMALLOC=malloc ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
export VFIODMA_PROFILE=short PYTHONPATH="$PWD"
"$python" -c 'import vfiodma, sys; assert vfiodma.__file__.startswith(sys.argv[1]), vfiodma.__file__' "$PWD"
exec "$python" -m pytest -p no:cacheprovider --timeout=600 "$@"
