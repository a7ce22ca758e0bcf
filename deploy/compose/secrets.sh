#!/usr/bin/env bash
# Makes the missing secrets of compose.yaml in secrets/ beside this file; existing ones stay.
set -euo pipefail
cd "$(dirname "$0")"

mkdir -p secrets
chmod 0700 secrets
for name in api-key signing-key ray-token database-password grafana-password; do
  [[ -s secrets/$name ]] && continue
  head -c 32 /dev/urandom | od -An -v -tx1 | tr -d ' \n' >"secrets/.$name"
  chmod 0444 "secrets/.$name"
  mv "secrets/.$name" "secrets/$name" # whole or not at all
  echo "made secrets/$name"
done
