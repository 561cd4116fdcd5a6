#!/bin/sh
# apt.sh WHAT PACKAGES: install Debian packages if apt can without a password; else say what is
# missing and what follows (WHAT), and end well.
what=$1
shift
if [ "$(id -u)" = 0 ]; then as=; else as="sudo -n"; fi
apt="apt-get -qq -o DPkg::Lock::Timeout=120"
if command -v apt-get >/dev/null && $as true 2>/dev/null && $as $apt update &&
  $as env DEBIAN_FRONTEND=noninteractive $apt install --no-install-recommends "$@" >/dev/null; then
  exit 0
fi
echo "$* could not be installed: $what"
