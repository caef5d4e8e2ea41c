#!/bin/sh
# Print the events of the last hour. Without follow=false the stream goes on with what happens from now on.
set -eu
gateway=${SHOAL_GATEWAY:-http://127.0.0.1:8080}

curl -fsS -N "$gateway/events?since=1h&follow=false" -H "Authorization: Bearer ${SHOAL_API_KEY:-}"
