#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# fetch_headers.sh FOLDER: ONNX Runtime's C headers (MIT) in FOLDER, from the Debian package libonnxruntime-dev. Where
# this release has none, from Debian 13, by way of a private apt state that changes nothing of the system's.
set -eu
folder=$1
mkdir -p "$folder/apt/lists/partial" "$folder/apt/archives/partial"
cd "$folder"
trap 'rm -rf apt ./*.deb' EXIT
if ! apt-get download -qq libonnxruntime-dev 2>/dev/null; then
  mirror=$(sed -n 's/^URIs: *//p;s/^deb \(\[[^]]*\] *\)\{0,1\}\([a-z]*:[^ ]*\) .*/\2/p' \
    /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list 2>/dev/null | head -n 1)
  : >apt/status
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror trixie main" >apt/sources.list
  cat >apt/apt.conf <<C
Dir::State "$PWD/apt"; Dir::State::status "$PWD/apt/status"; Dir::Cache "$PWD/apt";
Dir::Etc::sourcelist "$PWD/apt/sources.list"; Dir::Etc::sourceparts "-"; Acquire::Languages "none";
C
  export APT_CONFIG="$PWD/apt/apt.conf"
  apt-get update -qq
  apt-get download -qq libonnxruntime-dev
fi
dpkg-deb --fsys-tarfile libonnxruntime-dev_*.deb | tar x --strip-components=4 ./usr/include/onnxruntime
test -f onnxruntime_c_api.h
