"""The global batch: what ranks gather from each other before the loss."""

from partial_fc.batch.exchange import GlobalBatch
from partial_fc.batch.gather import gather

__all__ = ["GlobalBatch", "gather"]
