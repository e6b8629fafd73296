#!/bin/bash
# Installs nginx for the tests marked `cluster` where it may; elsewhere says so, and they skip. It is not started.
set -eu
command -v nginx >/dev/null && exit 0
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
    echo "nginx_install.sh: nginx not found. The tests behind it are skipped: install it, or run as root on Debian"
    exit 0
fi
policy=/usr/sbin/policy-rc.d # what Debian asks before it starts a daemon
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod +x "$policy"
fi
apt-get update -qq
DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends nginx
