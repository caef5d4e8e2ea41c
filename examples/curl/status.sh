#!/bin/sh
# Print the cluster's state: nodes, models, downloads, instances.
set -eu
gateway=${SHOAL_GATEWAY:-http://127.0.0.1:8080}

curl -fsS "$gateway/v1/status" -H "Authorization: Bearer ${SHOAL_API_KEY:-}"
