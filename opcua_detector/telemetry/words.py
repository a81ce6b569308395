"""The words of the metrics: name and help of each counter that a part of the service keeps."""

from __future__ import annotations

from collections.abc import Mapping

# Key of a counter -> (name within its subject, help). What stands in no table gets its key as name.
Table = Mapping[str, tuple[str, str]]
SESSION: Table = {
    "connects": ("connects", "Sessions that were made."),
    "reconnects": ("reconnects", "Sessions that were made again after a loss."),
    "failed_attempts": ("failed_attempts", "Attempts to connect again that failed."),
    "lost": ("connections_lost", "Connections that were lost."),
    "halved_calls": ("halved_calls", "Calls that were too large for the server and were made again in halves."),
    "changeovers": ("changeovers", "Changes to another endpoint of the redundant set."),
    "certificates_expired": ("certificates_expired", "Server certificates that expired while connected."),
    "trust_withdrawn": ("trust_withdrawn", "Connections that ended because the server is not trusted any more."),
    "oversized": ("oversized", "Connections that were dropped because the server sent more than is taken."),
}
PUBLISH: Table = {
    "publish_responses": ("publish_responses", "Answers to publish requests, of this connection."),
    "handler_errors": ("notification_errors", "Notifications that could not be worked on, of this connection."),
    "decode_errors": ("decode_errors", "Messages that could not be decoded, of this connection."),
    "too_many_publish": ("too_many_publish_requests", "Answers BadTooManyPublishRequests, of this connection."),
    "refused": ("refused", "Publish requests that were refused for another reason, of this connection."),
    "holes": ("holes", "Holes in the sequence of notifications, of this connection."),
    "republished": ("republished", "Notifications that were brought back by Republish, of this connection."),
    "lost_notifications": ("lost_notifications", "Notifications that could not be brought back, of this connection."),
    "duplicates": ("duplicates", "Notifications that came twice, of this connection."),
    "renumbered": ("renumbered", "Times that the server began anew with its sequence, of this connection."),
    "refused_acks": ("refused_acks", "Acknowledgements that the server refused, of this connection."),
    "unknown_subscription": ("unknown_subscription", "Notifications of subscriptions that are none of ours, of this "
                             "connection."),
}
SUBSCRIPTION: Table = {
    "notifications": ("notifications", "Notifications with values."),
    "samples": ("values", "Values that arrived."),
    "keep_alives": ("keep_alives", "Keep-alives: the server lives and nothing has changed."),
    "overload": ("overloaded_values", "Values with GoodOverload: the server lacks resources and samples slower."),
    "null_timestamp": ("values_without_source_timestamp", "Values without a SourceTimestamp."),
    "lost_notifications": ("lost_notifications", "Notifications that are missing in the sequence."),
    "rebuilt": ("rebuilds", "Subscriptions that were made again because the server ended them."),
    "type_changes": ("type_changes", "Changes of a tag from numbers to text or back."),
    "not_numeric": ("not_numeric", "Values that are masked because they are no numbers."),
    "silent_items": ("silent_items", "Items made again because the server did not report their changes any more."),
    "unknown_handles": ("unknown_handles", "Values of items that are none of ours."),
    "polls": ("polls", "Answers to reads of tags that cannot be monitored, or not fast enough."),
    "poll_overruns": ("poll_overruns", "Polls that were left out since an answer was slow."),
    "poll_holes": ("poll_holes", "Answers to polls that came so late that changes were missed; the next row is a gap."),
    "poll_failures": ("poll_failures", "Polls that were refused."),
    "handler_errors": ("handler_errors", "Polls that could not be worked on."),
}
GROUP: Table = {
    "delivered": ("samples_delivered", "Samples that came to the rule of time."),
    "used": ("samples_used", "Samples that became cells of rows."),
    "late": ("samples_late", "Samples older than one that their tag had used already."),
    "duplicate": ("samples_duplicate", "Samples with stamp and value of the one before."),
    "replaced": ("samples_replaced", "Samples of which a newer one stood in the same row."),
    "skipped": ("samples_skipped", "Samples that fell into no row."),
    "bad": ("samples_bad", "Samples with a Bad status."),
    "uncertain": ("samples_uncertain", "Samples with an Uncertain status."),
    "non_finite": ("samples_non_finite", "Samples that are NaN or infinite."),
    "overflowed": ("samples_overflowed", "Samples with the overflow bit: the server's queue lost some before them."),
    "null_timestamp": ("samples_without_source_timestamp", "Samples without a SourceTimestamp."),
    "lost": ("samples_lost", "Samples known to be lost: overflowed queues and missing notifications."),
    "held": ("cells_held", "Cells of rows with the last value of their tag."),
    "masked": ("cells_masked", "Cells of rows that are not valid."),
    "stale": ("cells_stale", "Cells of rows whose tag was silent for longer than max_hold."),
    "rows": ("rows", "Rows."),
    "gaps": ("gaps", "Rows that do not continue the row before."),
    "clock_back": ("clock_set_back", "Times that the clock of the source was set back."),
    "frame_errors": ("row_errors", "Rows that could not be worked on."),
    "clock_jumps": ("clock_jumps", "Times that the clock of a server was seen to be set; rows begin anew."),
    "ahead_of_clock": ("ahead_of_clock", "Samples left out because their stamps lie ahead of their server."),
    "gaps_filled": ("gaps_filled", "Gaps whose rows were read back from history."),
    "gaps_left": ("gaps_left", "Gaps that stay: without history, or beyond the bounds."),
    "backfilled_rows": ("backfilled_rows", "Rows that were read back from history."),
    "backfill_left_rows": ("backfill_left_rows", "Rows of gaps that were longer than what is read back."),
}
WRITE: Table = {
    "requests": ("requests", "Write requests sent."),
    "values": ("values", "Values sent."),
    "superseded": ("superseded", "Results that a newer one replaced before they were sent."),
    "failed_items": ("failed_values", "Values that the server refused."),
    "cast_errors": ("cast_errors", "Values that do not fit the type of their node."),
    "timeouts": ("timeouts", "Write requests that were not answered."),
    "refused": ("refused", "Outputs outside the allow-list; they are not written."),
    "limited": ("limited", "Times that a monitor had to wait for a limit of the configuration."),
    "withheld": ("withheld", "Results that were not written because another instance writes."),
    "dry": ("dry", "Values that a dry run would have written."),
    "read_back": ("read_back", "Values that were read again to compare them."),
    "read_back_failed": ("read_back_failed", "Times that what was written could not be read again."),
    "mismatches": ("mismatches", "Values that were read back different from what was written."),
}
LEASE: Table = {
    "gained": ("gained", "Leases that this instance took: it writes from then on."),
    "lost": ("lost", "Leases that this instance lost: another one may write."),
    "refused": ("refused", "Renewals that the server did not take."),
}
SERVICE: Table = {
    "loop_blocked": ("loop_blocked", "Times that our own event loop stood still for a second and more."),
    "detector_errors": ("detector_errors", "Rows that a detector could not work on."),
    "silences": ("silences", "Times that a monitor was told to have no data because no row came."),
    "events_dropped": ("events_dropped", "Alerts of a time without connection that are told in the store only."),
    "models_refused": ("models_refused", "Model files that a reload did not take."),
    "configs_refused": ("configs_refused", "Changed configurations that a reload found to have an error."),
}
STORE: Table = {
    "rows": ("rows_written", "Rows committed."),
    "verdicts": ("verdicts_written", "Verdicts committed."),
    "entries": ("entries_written", "Events, feedback, audit, models and runs committed."),
    "commits": ("commits", "Transactions."),
    "dropped_rows": ("rows_dropped", "Rows dropped because the ring was full."),
    "dropped_verdicts": ("verdicts_dropped", "Verdicts dropped because the ring was full."),
    "out_of_order_rows": ("rows_out_of_order", "Rows not later than the one before."),
    "rejected": ("rejected", "Entries that were refused for their content."),
    "write_errors": ("write_errors", "Attempts to commit that failed; each is made again."),
    "thinned_rows": ("rows_thinned", "Rows that retention thinned out."),
    "deleted_rows": ("rows_deleted", "Rows that retention deleted."),
    "decimated_trend": ("trend_coarsened", "Buckets of the trend that retention joined."),
}
