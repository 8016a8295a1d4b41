"""Data: from files and hub data sets to batches of token ids with exact prompt and response spans."""

from utils.data.collate import collate_preference, collate_sft, preference_tokens, sft_tokens
from utils.data.dataloader import RankDataLoader, accumulation_groups, build_dataloader, endless
from utils.data.dataset import TokenDataset, build_datasets
from utils.data.dialogue import render_prompt, render_response
from utils.data.example import Example
from utils.data.packing import PackedRows, micro_batches
from utils.data.sources import check_data_paths

__all__ = [
    "Example",
    "PackedRows",
    "RankDataLoader",
    "TokenDataset",
    "accumulation_groups",
    "build_dataloader",
    "build_datasets",
    "check_data_paths",
    "collate_preference",
    "collate_sft",
    "endless",
    "micro_batches",
    "preference_tokens",
    "render_prompt",
    "render_response",
    "sft_tokens",
]
