"""Peak memory of converting a Hugging Face folder of random weights, above that of the interpreter and its imports.

    python benchmarks/convert_memory.py --megabytes 2000

Prints for each direction the peak in megabytes and how many times the largest tensor that is.  Each conversion
runs in a process of its own, in which torch is never imported.  Exits non-zero above 2.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

# getrusage would not do: on Linux its maximum goes on counting from that of the parent.
CHILD = """
import sys
import mllm_jax.hf.convert as convert
status = lambda key: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key))
before = status("VmRSS")
convert.convert_folder(sys.argv[1], sys.argv[2], sys.argv[3])
assert "torch" not in sys.modules
print(status("VmHWM") - before)
"""


def make(folder: Path, megabytes: int) -> int:
    """A Llama of about so many megabytes in float32, in shards; returns the bytes of the largest tensor."""
    from mllm_jax.hf.export import write_hf
    from mllm_jax.hf.families import family

    vocab, width = 32_000, 64 * max(1, round(0.57 * megabytes**0.5))
    depth = max(1, round((megabytes * 1e6 / 4 - 2 * vocab * width) / (13 * width**2)))
    config = {"model_type": "llama", "vocab_size": vocab, "hidden_size": width, "intermediate_size": 3 * width,
              "num_attention_heads": width // 64, "num_key_value_heads": width // 64, "num_hidden_layers": depth}
    llama = family("llama")
    links = llama.links(llama.config(config, {}))
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = ((x, rng.random(x.shape, np.float32)) for x in links)
    write_hf(folder, llama, links, tensors, {x.ours: np.float32 for x in links}, max_shard_bytes=500_000_000)
    return max(4 * int(np.prod(x.shape)) for x in links)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=2000)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; a temporary folder by default")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as tmp:
        if not Path("/proc/self/status").exists():
            sys.exit("the peak is read from /proc/self/status, which only Linux has")
        source, native, back = (Path(tmp) / n for n in ("source", "native", "back"))
        largest = make(source, args.megabytes)
        total = sum(f.stat().st_size for f in source.glob("*.safetensors"))
        print(f"{total / 1e6:.0f} MB, largest tensor {largest / 1e6:.1f} MB,")
        worst = 0.0
        for a, b, to in ((source, native, "native"), (native, back, "hf")):
            start = time.perf_counter()
            out = subprocess.run([sys.executable, "-c", CHILD, a, b, to], check=True, capture_output=True, text=True)
            peak = int(out.stdout) * 1024
            worst = max(worst, peak / largest)
            print(f"to {to}: {time.perf_counter() - start:.1f} s, peak {peak / 1e6:.1f} MB, times the largest tensor: {peak / largest:.2f}")
    sys.exit(worst > 2.0)


if __name__ == "__main__":
    main()
