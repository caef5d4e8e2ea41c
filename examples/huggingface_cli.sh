#!/bin/sh
# Download a model from the cluster with Hugging Face's own command.
set -eu
model=${1:-shoal/tiny-fish}   # one that `shoal ls` lists; this is the demo's

settings=$(shoal hub)         # export HF_ENDPOINT=…, and HF_TOKEN=… with the node's key
eval "$settings"
hf download "$model"
