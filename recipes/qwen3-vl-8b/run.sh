#!/usr/bin/env bash
# The whole run of recipes/run.sh with Qwen3-VL-8B: recipes/qwen3-vl-8b/run.sh [--dry-run] [DATA [OUT]]
set -eu
dry=()
if [ "${1-}" = --dry-run ]; then dry=(--dry-run) && shift; fi
export SERVER="${SERVER:-transformers}" # vLLM refuses normed queries and keys
exec "$(dirname "$0")/../run.sh" "${dry[@]}" Qwen/Qwen3-VL-8B-Instruct \
    "${1:-lmms-lab/LLaVA-NeXT-Data}" "${2:-runs/qwen3-vl-8b}"
