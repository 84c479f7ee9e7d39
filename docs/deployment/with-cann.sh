#!/bin/bash
# Runs a command with the environment of CANN: with-cann python start.py
ascend="${ASCEND_ROOT:-/usr/local/Ascend}"
export LD_LIBRARY_PATH="$ascend/driver/lib64/driver:$ascend/driver/lib64/common${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
for file in "$ascend/ascend-toolkit/set_env.sh" "$ascend/cann/set_env.sh" "$ascend/nnal/atb/set_env.sh"; do
  if [ -r "$file" ]; then
    # shellcheck source=/dev/null
    source "$file"
  fi
done
# CANN writes logs and compiled kernels; its own choices, the home and the current folder, are read-only in our containers and units.
export ASCEND_PROCESS_LOG_PATH="${ASCEND_PROCESS_LOG_PATH:-/tmp/ascend/log}"
export ASCEND_WORK_PATH="${ASCEND_WORK_PATH:-/tmp/ascend/work}" ASCEND_CACHE_PATH="${ASCEND_CACHE_PATH:-/tmp/ascend/cache}"
mkdir -p "$ASCEND_PROCESS_LOG_PATH" "$ASCEND_WORK_PATH" "$ASCEND_CACHE_PATH"
exec "$@"
