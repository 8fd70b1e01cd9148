#!/usr/bin/env bash
# A whole run: chats, estimates, conversions, quality, benchmarks, fine-tuning, a server, speed.
#
#   recipes/run.sh [--dry-run] MODEL DATA OUT
#   recipes/run.sh Qwen/Qwen2.5-VL-7B-Instruct lmms-lab/LLaVA-NeXT-Data runs/qwen
#   recipes/run.sh zoo:qwen2_5_vl zoo runs/zoo          # chats of the zoo; small numbers
#
# MODEL is a hub id, a folder or zoo:NAME; DATA anything that `--data` takes, or "zoo". With --dry-run only chats
# are drawn and the conversions estimated. Each step's line of JSON is in OUT/steps; a step that has one is not
# repeated, so the same command resumes a run, and a line that is deleted has its step run again. What steps
# print is in OUT/log.txt; OUT/results.jsonl and OUT/results.md have all lines. A step that fails is said, those
# that need it are left out, and the run ends with 1. docs/full_run.md says how long it takes.
#
# What may be set in the environment, with its default:
#   SKIP=""                  steps to leave out, by how their names begin: "lmms-eval serve bench-25"
#   CONVERSIONS              lines of NAME:OPTIONS of `mha2mla convert`; see below
#   CALIBRATION=128 HELD_OUT=256 TRAIN=16384 EVERY=1    chats that are drawn, and of how many each is one
#   TASKS                    of lmms-eval, the paper's eight; "chats" are the held-out ones (for zoo:NAME)
#   NEEDED_KL=0.01           fine-tune what has a higher KL to the original on held-out chats
#   CONFIG                   the recipe of fine-tuning, by default single_stage of the model (mha2mla recipes)
#   FINETUNE_OPTIONS=""      options over it, as --max-steps 100
#   BATCH=8                  questions at a time
#   SERVER=auto              vllm or transformers; auto takes vLLM if it is installed
#   PORT=8000                of the server
#   BENCH_CONTEXTS="1024 16384 65536" BENCH_BATCHES="1 8" BENCH_SECONDS=2
#   DEVICE=auto              cpu or cuda, for what runs in one process
#   GPUS                     processes that share conversion, benchmarks and training; by default all GPUs
#   ACCELERATE_CONFIG        of training in several processes, by default accelerate/ddp
#   PYTHON=python            where this package is installed
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
PAPER=ai2d,gqa,pope,seedbench,realworldqa,mmbench_en_dev_static,chartqa,docvqa_val
# 25% in latents with rotated keys beside them, which decode fastest; 12.5% rotated at read; then bits by channel
SIZES="25:--rotate-at write --latent-bits 16 --budget 0.25
12.5:--rotate-at read --budget 0.125
6.25:--rotate-at read --latent-bits mixed --budget 0.0625"

refuse() { # MESSAGE
    echo "error: $1" >&2
    echo "usage: recipes/run.sh [--dry-run] MODEL DATA OUT (more in the head of the file)" >&2
    exit 2
}

say() { # WORDS: to the log and the terminal
    printf '%s %s\n' "$(date +%H:%M:%S)" "$*" >&2
}

given() { # read the command line
    DRY_RUN=
    if [ "${1-}" = --dry-run ]; then DRY_RUN=yes && shift; fi
    [ $# -eq 3 ] || refuse "three arguments are needed, not $#"
    MODEL=$1 DATA=$2 OUT=$3
    case $DATA in
    zoo) case $MODEL in zoo:*) ;; *) refuse "the data zoo goes with a model zoo:NAME, not $MODEL" ;; esac ;;
    esac
    if [ -e "$OUT" ] && [ ! -d "$OUT" ]; then refuse "$OUT is not a folder"; fi
    if [ -d "$OUT" ] && [ -n "$(ls -A "$OUT")" ] && [ ! -d "$OUT/steps" ]; then
        refuse "$OUT holds something else; give a new folder, or that of a run"
    fi
}

defaults() { # what is not set in the environment
    PYTHON=${PYTHON:-python} SKIP=${SKIP-} DEVICE=${DEVICE:-auto} SERVER=${SERVER:-auto} PORT=${PORT:-8000}
    CONVERSIONS=${CONVERSIONS:-$SIZES} EVERY=${EVERY:-1} CALIBRATION=${CALIBRATION:-128} BATCH=${BATCH:-8}
    NEEDED_KL=${NEEDED_KL:-0.01} FINETUNE_OPTIONS=${FINETUNE_OPTIONS-} BENCH_SECONDS=${BENCH_SECONDS:-2}
    BENCH_BATCHES=${BENCH_BATCHES:-1 8}
    case $MODEL in
    zoo:*) HELD_OUT=${HELD_OUT:-100} TRAIN=${TRAIN:-512} TASKS=${TASKS-chats} FOLDER=zoo
        BENCH_CONTEXTS=${BENCH_CONTEXTS:-1024 4096} ;;
    *) HELD_OUT=${HELD_OUT:-256} TRAIN=${TRAIN:-16384} TASKS=${TASKS-$PAPER}
        BENCH_CONTEXTS=${BENCH_CONTEXTS:-1024 16384 65536}
        case $MODEL in
        *Qwen3-VL*) FOLDER=qwen3-vl-8b ;;
        *llava-1.5*) FOLDER=llava-1.5-7b ;;
        *llava-next*) FOLDER=llama3-llava-next-8b ;;
        *) FOLDER=qwen2.5-vl-7b ;;
        esac ;;
    esac
    CONFIG=${CONFIG:-$FOLDER/single_stage}
    GPUS=${GPUS:-$({ nvidia-smi -L 2>/dev/null || true; } | wc -l)}
    mha2mla=("$PYTHON" -m mha2mla_vlm)
    together=("$PYTHON") trained=("$PYTHON")
    if [ "$GPUS" -gt 1 ]; then
        together=("$PYTHON" -m accelerate.commands.launch --num_processes "$GPUS")
        ACCELERATE_CONFIG=${ACCELERATE_CONFIG:-$("${mha2mla[@]}" recipes accelerate/ddp)}
        trained=("${together[@]}" --config_file "$ACCELERATE_CONFIG")
    fi
}

has() { # MODULE: whether Python finds it
    "$PYTHON" -c 'import importlib.util, sys; sys.exit(importlib.util.find_spec(sys.argv[1]) is None)' "$1"
}

results() { # COMMAND ...
    "$PYTHON" "$here/results.py" "$@"
}

step() { # NAME COMMAND...: unless it is done, or to be left out; the last line that it prints is kept
    local name=$1 kept="$OUT/steps/$1" word start=$SECONDS
    shift
    if [ -s "$kept.json" ]; then
        say "$name: done before"
        return
    fi
    for word in $SKIP; do
        case $name in "$word"*)
            say "$name: left out, as SKIP says"
            return
            ;;
        esac
    done
    say "$name: $*"
    if "$@" >"$kept.out" && results line "$name" $((SECONDS - start)) "$kept.out" >"$kept.tmp"; then
        mv "$kept.tmp" "$kept.json"
        say "$name: done in $((SECONDS - start)) s: $(cut -c 1-400 "$kept.json")"
    else
        rm -f "$kept.tmp"
        failed+=("$name")
        say "$name: FAILED after $((SECONDS - start)) s"
    fi
}

chats() { # draw them, to OUT/chats
    local name=${MODEL#zoo:}
    if [ "$DATA" != zoo ]; then
        rm -rf "$OUT/chats"
        "$PYTHON" "$here/draw.py" "$DATA" "$OUT/chats" --every "$EVERY" \
            --calibration "$CALIBRATION" --held-out "$HELD_OUT" --train "$TRAIN"
        return
    fi
    rm -rf "$OUT/chats" && mkdir "$OUT/chats" &&
        "${mha2mla[@]}" zoo data "$name" -o "$OUT/chats/calibration" --split train --samples "$CALIBRATION" --seed 1 &&
        "${mha2mla[@]}" zoo data "$name" -o "$OUT/chats/train" --split train --samples "$TRAIN" --seed 7 &&
        "${mha2mla[@]}" zoo data "$name" -o "$OUT/chats/held-out" --split test --samples "$HELD_OUT"
}

convert() { # FOLDER OPTIONS...: anew, where it stopped, or only say what is there
    local out=$1 more=()
    shift
    if [ -d "$out" ]; then
        "${mha2mla[@]}" inspect "$out"
        return
    fi
    if [ -d "$out.partial" ]; then more=(--resume); fi
    "${together[@]}" -m mha2mla_vlm convert "$MODEL" --data "$OUT/chats/calibration" -o "$out" \
        --samples "$CALIBRATION" --device "$DEVICE" "$@" "${more[@]}"
}

finetune() { # FOLDER: to FOLDER-tuned, anew or where it stopped
    local options
    if [ -d "$1-tuned" ]; then
        "${mha2mla[@]}" inspect "$1-tuned"
        return
    fi
    read -ra options <<<"$FINETUNE_OPTIONS"
    "${trained[@]}" -m mha2mla_vlm finetune "$1" --data "$OUT/chats/train" --eval-data "$OUT/chats/held-out" \
        -o "$1-tuned" --config "$CONFIG" --baseline "$MODEL" "${options[@]}"
}

score() { # MODEL FOLDER: by lmms-eval, whose results go to FOLDER
    local include=()
    if [ "$TASKS" = chats ]; then include=(--include_path "$OUT/task"); fi
    rm -rf "$2"
    "${together[@]}" -m lmms_eval --model mha2mla --model_args "pretrained=$1,device=$DEVICE" \
        --tasks "${TASKS/#chats/held_out_chats}" --batch_size "$BATCH" --output_path "$2" "${include[@]}" >&2 &&
        results scores "$2"
}

asked() { # MODEL: what a server of it answers to the first held-out question
    local server health="http://127.0.0.1:$PORT/health" pid start=$SECONDS status=0
    if [ "$SERVER" = vllm ]; then
        server=("$PYTHON" -m vllm.entrypoints.openai.api_server --model "$1" --port "$PORT")
    else
        server=("$PYTHON" -m transformers.cli.transformers serve --trust-remote-code --port "$PORT")
        if [ "$DEVICE" != auto ]; then server+=(--device "$DEVICE"); fi
    fi
    if curl -s --noproxy '*' "$health" >/dev/null; then
        say "port $PORT has a server; give another one as PORT"
        return 1
    fi
    "${server[@]}" >&2 &
    pid=$!
    until curl -sf --noproxy '*' "$health" >/dev/null; do
        if ! kill -0 "$pid" 2>/dev/null || [ $((SECONDS - start)) -gt 900 ]; then
            status=1
            break
        fi
        sleep 2
    done
    if [ "$status" -eq 0 ]; then
        results question "$OUT/chats/held-out" "$1" |
            curl -sf --noproxy '*' -H 'Content-Type: application/json' -d @- \
                "http://127.0.0.1:$PORT/v1/chat/completions" | results answer "$SERVER" || status=1
    fi
    kill "$pid" 2>/dev/null || true
    wait "$pid" || true
    return "$status"
}

bench() { # FOLDER
    local options=() each
    for each in $BENCH_CONTEXTS; do options+=(--context "$each"); done
    for each in $BENCH_BATCHES; do options+=(--batch-size "$each"); done
    "${mha2mla[@]}" bench "$1" --baseline "$MODEL" --seconds "$BENCH_SECONDS" --device "$DEVICE" "${options[@]}"
}

of_each() { # FUNCTION: for each conversion, with its name and its options
    local line options
    while IFS= read -r line <&3; do # not on standard input, which commands have
        read -ra options <<<"${line#*:}"
        "$1" "${line%%:*}" "${options[@]}"
    done 3<<<"$CONVERSIONS"
}

estimated() { # NAME OPTIONS...
    step "estimate-$1" "${mha2mla[@]}" convert "$MODEL" --data "$OUT/chats/calibration" -o "$OUT/$1-estimated" \
        --samples "$CALIBRATION" --device "$DEVICE" "${@:2}" --dry-run
}

made() { # NAME OPTIONS...: a conversion, its quality, and training if that is needed
    local evaluated="$OUT/steps/evaluate-$1.json"
    step "convert-$1" convert "$OUT/$1" "${@:2}"
    if [ ! -d "$OUT/$1" ]; then
        say "$1: no model, so nothing is done with it"
        return
    fi
    step "evaluate-$1" "${mha2mla[@]}" evaluate "$OUT/$1" --data "$OUT/chats/held-out" --baseline "$MODEL" \
        --batch-size "$BATCH" --device "$DEVICE"
    if [ ! -s "$evaluated" ]; then
        say "finetune-$1: left out, for the KL is not known"
    elif results above "$NEEDED_KL" "$evaluated" kl; then
        step "finetune-$1" finetune "$OUT/$1"
    else
        say "finetune-$1: not needed, the KL is $NEEDED_KL or less"
    fi
}

scored() { # NAME: by lmms-eval, as converted and as trained
    local name
    for name in "$1" "$1-tuned"; do
        if [ -d "$OUT/$name" ]; then step "lmms-eval-$name" score "$OUT/$name" "$OUT/lmms-eval/$name"; fi
    done
}

benchmarks() { # the original and all that was made
    if [ -z "$TASKS" ]; then
        say "lmms-eval: left out, no TASKS"
    elif ! has lmms_eval; then
        say "lmms-eval: left out, it is not installed: pip install 'mha2mla-vlm[eval]'"
    else
        if [ "$TASKS" = chats ]; then
            step lmms-eval-task "${mha2mla[@]}" task "$OUT/chats/held-out" -o "$OUT/task" --name held_out_chats
        fi
        step lmms-eval-original score "$MODEL" "$OUT/lmms-eval/original"
        of_each scored
    fi
}

served() { # the smallest, trained if it was
    local name=$last
    if [ -d "$OUT/$last-tuned" ]; then name=$last-tuned; fi
    if [ "$SERVER" = auto ]; then
        SERVER=transformers
        if has vllm; then SERVER=vllm; fi
    fi
    if [ ! -d "$OUT/$name" ]; then
        say "serve: left out, there is no $OUT/$name"
    elif [ "$SERVER" = vllm ] && ! has vllm; then
        say "serve: left out, vLLM is not installed: pip install 'mha2mla-vlm[vllm]'"
    elif [ "$SERVER" = transformers ] && ! { has fastapi && has uvicorn; }; then
        say "serve: left out, neither vLLM nor what transformers serve needs is installed: pip install 'mha2mla-vlm[serve]'"
    else
        step "serve-$name" asked "$OUT/$name"
    fi
}

benched() { # NAME
    if [ -d "$OUT/$1" ]; then step "bench-$1" bench "$OUT/$1"; fi
}

main() {
    given "$@"
    defaults
    mkdir -p "$OUT/steps"
    OUT=$(cd "$OUT" && pwd)
    if [ -e "$MODEL" ]; then MODEL=$(cd "$MODEL" && pwd); fi
    exec > >(tee -a "$OUT/log.txt") 2>&1
    trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
    failed=()
    last=${CONVERSIONS##*$'\n'} last=${last%%:*}
    say "$MODEL, $DATA, $OUT; $GPUS GPUs"
    step data chats
    [ -d "$OUT/chats/held-out" ] || { say "no chats, so nothing is done" && exit 1; }
    of_each estimated
    if [ -z "$DRY_RUN" ]; then
        of_each made
        benchmarks
        served
        of_each benched
    fi
    results table "$OUT"
    say "results in $OUT/results.jsonl and $OUT/results.md; failed: ${failed[*]:-none}"
    cat "$OUT/results.md"
    [ ${#failed[@]} -eq 0 ]
}

main "$@"
