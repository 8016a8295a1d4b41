"""Data: from files and hub data sets to batches of token ids with exact prompt and response spans."""

from utils.data.batches.collate import collate_labelled, collate_preference, collate_sft
from utils.data.batches.dataloader import RankDataLoader, accumulation_groups, build_dataloader, endless
from utils.data.batches.packing import PackedRows, micro_batches, pack_rows
from utils.data.formats.example import Example
from utils.data.rows.dataset import TokenDataset, build_datasets
from utils.data.sources.corpus import Corpus

__all__ = [
    "Corpus",
    "Example",
    "PackedRows",
    "RankDataLoader",
    "TokenDataset",
    "accumulation_groups",
    "build_dataloader",
    "build_datasets",
    "collate_labelled",
    "collate_preference",
    "collate_sft",
    "endless",
    "micro_batches",
    "pack_rows",
]
