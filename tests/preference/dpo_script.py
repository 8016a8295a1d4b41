"""The script of direct preference optimisation and its flags on the tiny world."""

from pathlib import Path

from step_scripts import load_step, step_config, write_rows

from utils.arguments import DpoConfig


def config(world, output: Path | None = None, **changes) -> DpoConfig:
    flags = {"data_split": "0,1,0", "num_sample_generations": 2, "sample_max_new_tokens": 8, "max_steps": 4}
    return step_config(world, "dpo", output, **(flags | changes))


def run_script(configuration: DpoConfig) -> dict[str, float]:
    return load_step("dpo").main(configuration)


def labelled_file(folder: Path, count: int = 24) -> str:
    """Rows of one answer each: polite ones are desirable."""
    rows = []
    for index in range(count):
        prompt = f" Human: what colour is thing {index} ? Assistant:"
        rows.append({"prompt": prompt, "completion": f" it is {['red', 'white'][index % 2]} .", "label": True})
        rows.append({"prompt": prompt, "completion": " go away !", "label": index % 5 == 0})
    return write_rows(folder / "labelled.jsonl", rows)
