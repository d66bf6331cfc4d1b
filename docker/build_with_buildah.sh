#!/usr/bin/env bash
# Builds the image and runs it where there is no Docker engine: with Debian's buildah (1.28 or newer, chroot
# isolation) on a base made by debootstrap. As root; apt-get install buildah debootstrap.
#
#   MIRROR=URL [BUNDLE=DIR] docker/build_with_buildah.sh WORK [OPTION OF buildah build …]
#
# MIRROR      Debian mirror for the base
# BUNDLE      folder made by `make bundle` with Debian's Python; then the build has no network at all. Without
#             it pip's settings can be given as for docker: --secret id=pip,src=pip.conf
# SUITE       Debian release, by default bookworm (Python 3.11)
# STORAGE_DRIVER  of buildah, by default overlay
# IMRCNN_TEST_DATA  folder of real images for the tests, if there is one
# KEEP=1      keep base and image in WORK/storage; the next run takes the base that it finds there
#
# WORK needs about 30 GB; 17 GB where it compresses (btrfs, compress=zstd:1). It is emptied in the end.
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 2; }
: "${MIRROR:?MIRROR=URL names the Debian mirror for the base}"
work="$(realpath -m "$1")"
shift
mkdir -p "$work"
bundle="${BUNDLE:+$(realpath "$BUNDLE")}"
cd "$(dirname "$0")/.."

# Not the caller's, so that errors of users and permissions show.
uid=12345 gid=23456
export TMPDIR="$work/tmp" BUILDAH_ISOLATION=chroot
mkdir -p "$TMPDIR" "$work/data" "$work/outputs"

b() {
    buildah --root "$work/storage" --runroot "$work/run" \
        --storage-driver "${STORAGE_DRIVER:-overlay}" "$@"
}
step() { printf '\n== %5d s  %s\n' "$SECONDS" "$*"; }
fail() { echo "FAILED: $*" >&2; exit 1; }
clean() {
    b rm --all > /dev/null || true
    if [ -z "${KEEP:-}" ]; then
        b rmi --all --force > /dev/null || true
        rm -rf "$work/storage" "$work/run"
    fi
    rm -rf "$work/root" "$work/data" "$work/outputs" "$TMPDIR"
}
trap clean EXIT

step "Base: ${SUITE:=bookworm}"
if ! b inspect --type image imrcnn-base > /dev/null 2>&1; then
    packages=python3
    [ -z "$bundle" ] || packages=ca-certificates,make,python3-venv,tini
    rm -rf "$work/root"
    debootstrap --variant=minbase --include="$packages" "$SUITE" "$work/root" "$MIRROR" \
        > "$work/debootstrap.log" || fail "debootstrap, see $work/debootstrap.log"
    rm -rf "$work/root"/var/cache/apt/archives/*.deb "$work/root"/var/lib/apt/lists/*
    ctr="$(b from scratch)"
    b add -q "$ctr" "$work/root" / > /dev/null
    b commit -q --rm "$ctr" imrcnn-base > /dev/null
    rm -rf "$work/root"
fi

step "Build${bundle:+, only from $bundle, without a network}"
offline=()
[ -z "$bundle" ] || offline=(unshare --net)
build=(buildah --root "$work/storage" --runroot "$work/run"
    --storage-driver "${STORAGE_DRIVER:-overlay}" build)
"${offline[@]}" "${build[@]}" --build-arg BASE_IMAGE=localhost/imrcnn-base \
    --build-arg UID=$uid --build-arg GID=$gid \
    --build-arg REVISION="$(git rev-parse HEAD 2> /dev/null || true)" \
    ${bundle:+--build-context "bundle=$bundle"} "$@" --tag imrcnn-d2 . > "$work/build.log" 2>&1 \
    || { tail -n 30 "$work/build.log" >&2; fail "the build, see $work/build.log"; }
b images --format '{{.Name}} {{.Size}}'

[ "$(b inspect --type image --format '{{.OCIv1.Config.Volumes}}' imrcnn-d2)" \
    = 'map[/data:{} /outputs:{}]' ] || fail "its volumes are not /data and /outputs"
ctr="$(b from imrcnn-d2)"
# buildah run would mount its anonymous volumes in place of the given ones.
b config --volume /data- --volume /outputs- "$ctr"
mapfile -t entrypoint < <(b inspect --type image --format \
    '{{range .OCIv1.Config.Entrypoint}}{{println .}}{{end}}' imrcnn-d2 | sed '/^$/d')
chown $uid:$gid "$work/data" "$work/outputs"
volumes=(--volume "$work/data:/data" --volume "$work/outputs:/outputs")
# run [OPTION OF buildah run …] -- ARGUMENT OF docker run IMAGE …
run() {
    local options=()
    while [ "$1" != -- ]; do options+=("$1"); shift; done
    shift
    b run "${volumes[@]}" ${options[@]+"${options[@]}"} "$ctr" -- "${entrypoint[@]}" "$@"
}

step "What is in it"
[ "$(run -- id -u):$(run -- id -g)" = $uid:$gid ] || fail "it runs as another user"
run -- bash -c '
    for name in cc gcc g++ c++ clang nvcc ld git; do
        ! command -v $name || { echo "$name is in the image"; exit 1; }
    done
    caches="$(find / -xdev \( -path "*/.cache/pip" -o -path "*/apt/archives/*.deb" -o -name "*.partial" \) \
        2> /dev/null)"
    [ -z "$caches" ] || { echo "Caches: $caches"; exit 1; }
    [ ! -w /app ] || { echo "/app can be written"; exit 1; }
    cd /app/.venv/lib/python3*/site-packages
    du -smc nvidia triton torch | sed "s/^/MB /"
    echo "MB $(du -sm . | cut -f1) all packages, MB $(du -smx --exclude=/proc --exclude=/sys --exclude=/app \
        --exclude=/dev --exclude=/data --exclude=/outputs / 2> /dev/null | cut -f1) base and programs"
'

step "Another tool by name"
run -- prepare_dataset synthetic --out /data/synthetic --num-images 40 --size 128
config=(configs/imrcnn_lite_demo.yaml --data synthetic)
short=(SOLVER.MAX_EPOCHS 0 SOLVER.STEPS "()" SOLVER.WARMUP_ITERS 2 TEST.EVAL_PERIOD 0
    SOLVER.CHECKPOINT_PERIOD 1000 DATALOADER.NUM_WORKERS 1)

step "Training by the entry point"
run -- --config-file "${config[@]}" "${short[@]}" SOLVER.MAX_ITER 4 OUTPUT_DIR output/short
test -s "$work/outputs/short/model_final.pth" || fail "no weights in the volume"
foreign="$(find "$work/outputs" "$work/data" ! \( -uid $uid -gid $gid \))"
[ -z "$foreign" ] || fail "files of another user: $foreign"
run -- report /outputs/short --output /outputs/report.html
test -s "$work/outputs/report.html"

step "Prediction with these weights"
run -- predict --weights /outputs/short/model_final.pth --input /data/synthetic/images/patient000_view0.jpg \
    --output /outputs/predicted
test -s "$work/outputs/predicted/predictions.json" || fail "no predictions in the volume"

step "Any other user, as docker run --user"
install -d -o 4321 -g 4321 "$work/outputs/other"
run --user 4321:4321 -- --config-file "${config[@]}" "${short[@]}" SOLVER.MAX_ITER 2 \
    OUTPUT_DIR /outputs/other/run
[ "$(stat -c %u:%g "$work/outputs/other/run/model_final.pth")" = 4321:4321 ] || fail "uid of --user"

step "SIGTERM, as docker stop"
descendant() { # PID NAME: the process NAME below PID
    local child
    for child in $(pgrep -P "$1"); do
        if [ "$(cat "/proc/$child/comm")" = "$2" ]; then echo "$child"; else descendant "$child" "$2"; fi
    done
}
run -- --config-file "${config[@]}" --resume "${short[@]}" SOLVER.MAX_ITER 100000 \
    OUTPUT_DIR output/stopped > "$work/stopped.log" 2>&1 &
job=$!
for _ in $(seq 300); do
    ! grep -q ' iter: ' "$work/stopped.log" || break
    kill -0 $job 2> /dev/null || break
    sleep 1
done
grep -q ' iter: ' "$work/stopped.log" || { tail "$work/stopped.log"; fail "it does not train"; }
started=$SECONDS
kill -TERM "$(descendant $job tini)"
code=0
wait $job || code=$?
echo "Exit code $code after $((SECONDS - started)) s"
[ $code = 75 ] || { tail "$work/stopped.log"; fail "exit code $code instead of 75"; }
reached="$(grep -o 'iter: [0-9]*' "$work/stopped.log" | tail -n 1 | cut -d' ' -f2)"
run -- --config-file "${config[@]}" --resume "${short[@]}" SOLVER.MAX_ITER $((reached + 25)) \
    OUTPUT_DIR output/stopped | tee "$work/resumed.log" | grep -i 'iteration\|iter:' | head -n 5
test -s "$work/outputs/stopped/model_final.pth" || fail "it was not resumed"

step "The fast tests"
data=()
[ -z "${IMRCNN_TEST_DATA:-}" ] || data=(--volume "$(realpath "$IMRCNN_TEST_DATA"):/test-data:ro"
    --env IMRCNN_TEST_DATA=/test-data)
run ${data[@]+"${data[@]}"} -- pytest -m "not slow" -q -p no:cacheprovider

step "All well"
