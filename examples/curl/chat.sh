#!/bin/sh
# Ask a model that is running (`shoal ps`); the answer arrives as server-sent events.
set -eu
gateway=${SHOAL_GATEWAY:-http://127.0.0.1:8080}
model=${1:-shoal/tiny-fish}

curl -fsS -N "$gateway/v1/chat/completions" -H "Authorization: Bearer ${SHOAL_API_KEY:-}" \
  -d "{\"model\": \"$model\", \"stream\": true, \"temperature\": 0,
       \"messages\": [{\"role\": \"user\", \"content\": \"Why do fish swim together?\"}]}"
