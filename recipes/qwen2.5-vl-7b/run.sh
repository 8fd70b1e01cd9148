#!/usr/bin/env bash
# The whole run of recipes/run.sh with Qwen2.5-VL-7B: recipes/qwen2.5-vl-7b/run.sh [--dry-run] [DATA [OUT]]
set -eu
dry=()
if [ "${1-}" = --dry-run ]; then dry=(--dry-run) && shift; fi
exec "$(dirname "$0")/../run.sh" "${dry[@]}" Qwen/Qwen2.5-VL-7B-Instruct \
    "${1:-lmms-lab/LLaVA-NeXT-Data}" "${2:-runs/qwen2.5-vl-7b}"
