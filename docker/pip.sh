#!/bin/sh
# pip as the Dockerfile needs it: only wheels, nothing cached, and a pip.conf and a CA bundle if they were given.
set -eu
if [ -s /run/secrets/pip.conf ]; then
    export PIP_CONFIG_FILE=/run/secrets/pip.conf
fi
if [ -s /run/secrets/ca_bundle.pem ]; then
    export PIP_CERT=/run/secrets/ca_bundle.pem
fi
# Debian's and Ubuntu's pip refuse to write beside the distribution's packages without being told; here that is meant.
export PIP_BREAK_SYSTEM_PACKAGES=1 PIP_ROOT_USER_ACTION=ignore PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
command="$1"
shift
exec python3 -m pip "$command" --quiet --no-deps --only-binary :all: "$@"
