"""Download a model from the cluster with huggingface_hub (`pip install huggingface_hub`).

`eval "$(shoal hub)"` first: it sets HF_ENDPOINT, and HF_TOKEN to the node's key.
"""

import os
from pathlib import Path

from huggingface_hub import snapshot_download

MODEL = "shoal/tiny-fish"  # one that `shoal ls` lists; this is the demo's

print(f"downloading {MODEL} from {os.environ['HF_ENDPOINT']}")
directory = Path(snapshot_download(MODEL))
for file in sorted(directory.iterdir()):
    print(f"{file.stat().st_size:>10} {file.name}")
