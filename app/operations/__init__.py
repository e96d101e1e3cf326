"""The operations on runs, one module for each; `TABLE` says which requests each one performs."""

from collections.abc import Mapping

from app.operations.add_tags import add_tags
from app.operations.cancel import cancel
from app.operations.list_runs import list_runs
from app.operations.replay import replay
from app.operations.reschedule import reschedule
from app.operations.reset_key import reset_key
from app.operations.retrieve import retrieve
from app.operations.scene import Perform
from app.operations.update_metadata import update_metadata
from schemas import operations as requests

TABLE: Mapping[type, Perform] = {
    requests.Retrieve: retrieve,
    requests.Cancel: cancel,
    requests.Reschedule: reschedule,
    requests.AddTags: add_tags,
    requests.UpdateMetadata: update_metadata,
    requests.Replay: replay,
    requests.List: list_runs,
    requests.ResetKey: reset_key,
}
