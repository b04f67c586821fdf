"""Imported by the server that forks processes: it does once what each of them would do first."""

import contextlib
import io
from importlib import import_module
from pathlib import Path

from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from plprune.cli import main

for module in ("tests.runs", "transformers.models.llama.modeling_llama"):
    import_module(module)
get_checkpoint_conversion_mapping("llama")  # whose first call compiles hundreds of patterns
quickstart = Path(__file__).parents[1] / "configs" / "quickstart.yaml"
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main(["fit", f"--config={quickstart}", "--print_config"])  # which makes the parsers
