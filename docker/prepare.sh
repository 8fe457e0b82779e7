#!/bin/sh
# The user that serves, and the folders that the volumes are mounted on: a new named volume takes their owner and mode.
set -eu
if ! getent passwd 10001 > /dev/null; then
    useradd --uid 10001 --gid 0 --no-create-home --home-dir /var/cache/step128 --shell /usr/sbin/nologin step128
fi
mkdir -p /var/cache/step128 /var/lib/step128 /models
chown 10001:0 /var/cache/step128 /var/lib/step128
chmod 2770 /var/cache/step128 /var/lib/step128
