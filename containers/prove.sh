#!/usr/bin/env bash
# Build the Dockerfile and run its image where no Docker daemon is: Debian's buildah, over a base
# made by debootstrap.  Then run it as a cluster would: read-only root, no network, a user without
# an account or a home.  Needs root, buildah and debootstrap.
#
#   containers/prove.sh WORK BIDS_DIR OUT participant [OPTIONS]
#
# BUILD_OPTIONS go to buildah, such as "-v /etc/pip.conf:/etc/pip.conf:ro".
set -euo pipefail
mkdir -p "$1" "$3"
work=$(realpath "$1") bids=$(realpath "$2") out=$(realpath "$3")
shift 3
cd "$(dirname "$0")/.."
export STORAGE_DRIVER=${STORAGE_DRIVER:-vfs}

if ! buildah inspect --type image cadiff-base > /dev/null 2>&1; then
  [ -d "$work/root" ] || debootstrap --variant=minbase bookworm "$work/root"
  base=$(buildah from scratch)
  buildah add --quiet "$base" "$work/root" /
  buildah config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$base"
  buildah commit --quiet --rm "$base" cadiff-base
fi
# shellcheck disable=SC2086  # several options
buildah bud --isolation chroot --build-arg BASE_IMAGE=localhost/cadiff-base ${BUILD_OPTIONS:-} \
  --tag cadiff .

container=$(buildah from cadiff)
root=$(buildah mount "$container")
trap 'buildah rm "$container" > /dev/null' EXIT
mapfile -t environment < <(buildah inspect --format '{{range .OCIv1.Config.Env}}{{println .}}{{end}}' \
  "$container" | sed '/^$/d')
mkdir -p "$root/data/bids" "$root/data/out"
chmod a+rwx "$out"
unshare --net --mount --fork --pid bash -euo pipefail -s -- "$@" << END
mount --make-rprivate /
mount --bind "$root" "$root"
mount --bind "$bids" "$root/data/bids"
mount --bind "$out" "$root/data/out"
mount -t proc proc "$root/proc"
mount -t tmpfs tmpfs "$root/tmp"
mount -t tmpfs tmpfs "$root/dev"
mkdir "$root/dev/shm" && chmod 1777 "$root/dev/shm"
for device in null zero urandom; do touch "$root/dev/\$device"; mount --bind "/dev/\$device" "$root/dev/\$device"; done
mount -o remount,bind,ro "$root/data/bids"
mount -o remount,bind,ro "$root"
exec chroot "$root" /usr/bin/setpriv --reuid 54321 --regid 54321 --clear-groups \
  --inh-caps=-all --ambient-caps=-all --bounding-set=-all \
  /usr/bin/env -i ${environment[*]} \
  cadiff run /data/bids /data/out "\$@"
END
