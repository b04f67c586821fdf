"""`plprune evaluate`: what a model is worth."""

from plprune.checkpoint import Dtype, load_model, load_tokenizer
from plprune.evaluation import measure, table
from plprune.processes import device_called
from plprune.text import PYDOC, check_sizes, check_source, pack, tokenised


def evaluate(
    model: str,
    text: str = PYDOC,
    join: str | None = None,
    seq_len: int = 512,
    max_windows: int | None = None,
    dtype: Dtype = "float32",
    device: str = "cpu",
) -> None:
    """Measures a model, pruned or dense: perplexity, parameters, size and speed.

    Args:
        model: A folder, a name on the hub, a `.gguf` file, or `package://PACKAGE/FILE.gguf`.
        text: What to read: a `.txt`, `.jsonl` or `.parquet` file, `ORG/NAME[:CONFIG[:SPLIT]]` of the hub, or
            `pydoc_data.topics`.
        join: Put between the rows of the text, which are then one document: "\\n\\n" is usual for WikiText.
        seq_len: Tokens of a window; the first of each is given, and no token is put before it.
        max_windows: At most this many windows from the start of the text; all if not given.
        dtype: Of the weights.
        device: Where to compute: cpu, cuda, cuda:1.
    """
    check_sizes(seq_len=seq_len, max_windows=max_windows)
    check_source(text)
    place = device_called(device)
    ids = pack(tokenised(text, load_tokenizer(model), join), seq_len, "evaluation").tensors[0][:max_windows]
    row = measure(load_model(model, dtype).to(place), list(ids.split(1)))  # type: ignore[arg-type]
    print(table({"model": row}))
    print(f"perplexity over {len(ids)} windows of {seq_len} tokens of {text}, windows do not overlap, no BOS")
