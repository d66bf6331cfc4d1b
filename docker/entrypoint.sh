#!/bin/sh
# IMAGE --config-file FILE …    trains (tools/train_net.py)
# IMAGE TOOL …                  tools/TOOL.py: evaluate, prepare_dataset, report …
# IMAGE COMMAND …               any other program: bash, pytest, tensorboard, python
app="$(cd "$(dirname "$0")/.." && pwd)"
case "${1-}" in
    "" | -*) set -- train_net "$@" ;;
esac
case "$1" in
    */*) ;;
    *)
        if [ -f "$app/tools/$1.py" ]; then
            tool="$app/tools/$1.py"
            shift
            set -- python "$tool" "$@"
        fi
        ;;
esac
if ! command -v "$1" > /dev/null; then
    echo "There is no tool and no program '$1'. The tools:" \
        "$(cd "$app/tools" && ls -- *.py | sed 's/\.py$//' | xargs)" >&2
    exit 127
fi
# Replaces this shell, so that signals reach the program.
exec "$@"
