"""In the place of a job's command, for tests of the launcher: it writes run.json as a job does, at once."""

import json
import os
import re
import sys
import time
from pathlib import Path

words = sys.argv[2:]
folder = Path(re.search(r"hydra\.run\.dir='(.*)'$", words[-1]).group(1).replace("\\'", "'"))
given = {key: value for key, _, value in (word.partition("=") for word in words)}
with (folder.parent / "log.jsonl").open("a") as log:
    seen = {"job": folder.name, "words": words, "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"), "began": time.monotonic()}
    log.write(json.dumps(seen | {"group": os.environ.get("WANDB_RUN_GROUP"), "rank": os.environ.get("LOCAL_RANK")}) + "\n")
seed = int(given["seed"])
time.sleep(float(os.environ.get("STUB_SECONDS", "0")))
if seed == 3:
    print("error: this job fails on purpose")
    sys.exit(1)
if seed == 4:
    os.abort()
overrides = [word for word in words if not word.startswith(("hydra.", "ckpt_path="))]
record = {"verb": "train", "status": "finished", "overrides": overrides, "objective": 1.0 - abs(seed - 2)}
record["metrics"] = {"before": {"total": 1.0}, "after": {"total": 1.0 + seed}}
(folder / "run.json").write_text(json.dumps(record))
