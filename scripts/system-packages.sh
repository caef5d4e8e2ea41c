#!/usr/bin/env bash
# What Shoal wants from the system beside Python: OpenBLAS, without which MLX's Linux CPU build is some thirty times
# slower in f32. Installed by apt where there is one and we may; elsewhere this says what to do and goes on, because
# everything works without it too. macOS needs nothing: MLX uses Accelerate and Metal there.
#
# `system-packages.sh test` adds what tests use: strace, which kills the store at every one of its system calls, the
# makers of the file systems on which its power is cut, and curl, which some examples use. `system-packages.sh bench` adds what makes links,
# and nginx, beside which the fileserver is measured.
set -euo pipefail
[ "$(uname -s)" = Linux ] || exit 0

if ! python3 -c 'import venv, ensurepip' 2>/dev/null; then
  missing_venv=1
else
  missing_venv=0
fi
have_openblas() { ldconfig -p 2>/dev/null | grep -q 'libopenblas'; }

packages=()
have_openblas || packages+=(libopenblas0-pthread)
[ "$missing_venv" = 0 ] || packages+=(python3-venv)
if [ "${1:-}" = test ]; then
  PATH=$PATH:/usr/sbin:/sbin
  command -v strace >/dev/null || packages+=(strace)
  command -v curl >/dev/null || packages+=(curl)
  command -v mkfs.xfs >/dev/null || packages+=(xfsprogs)
  command -v mkfs.ext4 >/dev/null || packages+=(e2fsprogs)
  command -v ip >/dev/null || packages+=(iproute2)
fi
if [ "${1:-}" = bench ]; then
  PATH=$PATH:/usr/sbin:/sbin
  { command -v ip && command -v tc; } >/dev/null || packages+=(iproute2)
  command -v nginx >/dev/null || packages+=(nginx-light)
fi
[ ${#packages[@]} -gt 0 ] || exit 0

run=()
if [ "$(id -u)" != 0 ]; then
  if command -v sudo >/dev/null && sudo -n true 2>/dev/null; then run=(sudo -n); else run=(false); fi
fi
if command -v apt-get >/dev/null && [ "${run[0]:-}" != false ]; then
  echo "installing ${packages[*]} with apt"
  if "${run[@]}" apt-get update -qq && "${run[@]}" env DEBIAN_FRONTEND=noninteractive \
      apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null; then
    exit 0
  fi
fi
echo "please install ${packages[*]} (or your system's package of the same name)" >&2
[ "$missing_venv" = 0 ] || { echo "Shoal needs Python's venv module: it cannot go on without" >&2; exit 1; }
echo "Shoal works without them: without OpenBLAS it generates slowly on a Linux CPU, without the others tests are skipped and figures left out" >&2
