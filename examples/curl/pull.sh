#!/bin/sh
# Download a model to every node, and wait until it is there. It crosses the internet once.
set -eu
gateway=${SHOAL_GATEWAY:-http://127.0.0.1:8080}
model=${1:-shoal/tiny-fish}

curl -fsS "$gateway/v1/downloads" -H "Authorization: Bearer ${SHOAL_API_KEY:-}" \
  -d "{\"model\": \"$model\", \"nodes\": \"all\", \"wait\": true}"
