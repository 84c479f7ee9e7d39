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
exec "$@"
