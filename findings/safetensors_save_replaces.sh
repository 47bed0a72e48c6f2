#!/bin/sh
# safetensors 0.8.0 (Python 3.11, Linux): save_file does not write into the file of that name, it replaces that file.
#
# Whatever the umask and the mode of the file that was there, the new one has mode 0600, so that nobody else on a shared
# machine can read the checkpoint; and a symbolic link of that name, such as those of the Hugging Face cache, becomes a
# file, while the file that it pointed to keeps its old content.
# One guesses what open(path, "wb") does, and what safetensors 0.7.0 did: the mode is that of the file, or as the umask
# says, and a link is followed.
#
# Seen:
#   0.7.0: new file 644, file of mode 664 stays 664, link stays a link
#   0.8.0: new file 600, file of mode 664 becomes 600, link becomes a file, its target stays empty
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
umask 022

seen() {  # of a version: modes of a new file and of one of 664, whether the link is still one, bytes behind it
    python3 -m venv "v$1"
    "v$1/bin/pip" install -q numpy==2.3.5 "safetensors==$1"
    rm -f new old target link
    touch old target
    chmod 664 old
    ln -s target link
    "v$1/bin/python" - <<'PYTHON'
import os
import numpy
from safetensors.numpy import save_file

for name in "new", "old", "link":
    save_file({"a": numpy.ones(3)}, name)
modes = [format(os.stat(name).st_mode & 0o777, "o") for name in ("new", "old")]
print(*modes, "link" if os.path.islink("link") else "file", os.path.getsize("target"))
PYTHON
}

before=$(seen 0.7.0)
now=$(seen 0.8.0)
echo "safetensors 0.7.0: $before"
echo "safetensors 0.8.0: $now"
[ "$before" = "644 664 link 88" ] && [ "$now" = "600 600 file 0" ]
