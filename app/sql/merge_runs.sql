-- Bring together what was changed on rows, and apart from that while the same runs were buffered: two workers had
-- one request at the same time, and decided otherwise. Nothing is lost but for changes of one and the same key of the
-- metadata: the buffered one is kept. Of two delays the later counts.
-- $1  mollifier.new_run[]
-- Once only: the row has applied the last change then.
UPDATE mollifier.runs AS run
SET status = CASE WHEN new.status = 'CANCELED' AND run.status IN ('DELAYED', 'QUEUED') THEN new.status
        ELSE run.status END,
    cancelled_at = coalesce(run.cancelled_at, new.cancelled_at),
    cancel_reason = CASE WHEN run.cancelled_at IS NULL THEN new.cancel_reason ELSE run.cancel_reason END,
    delay_until = greatest(run.delay_until, new.delay_until),
    tags = run.tags || ARRAY(
        SELECT tag FROM unnest(new.tags) WITH ORDINALITY AS added (tag, position)
        WHERE tag <> ALL (run.tags) ORDER BY position
    ),
    metadata = CASE
        WHEN jsonb_typeof(run.metadata) = 'object' AND jsonb_typeof(new.metadata) = 'object'
            THEN run.metadata || new.metadata
        ELSE coalesce(new.metadata, run.metadata)
    END,
    metadata_version = greatest(run.metadata_version, new.metadata_version) + 1,
    idempotency_key = CASE WHEN new.idempotency_key IS NOT NULL THEN run.idempotency_key END,
    idempotency_key_expires_at = CASE WHEN new.idempotency_key IS NOT NULL
        THEN run.idempotency_key_expires_at END,
    revision = greatest(run.revision, new.revision) + 1,
    applied = run.applied || new.applied,
    updated_at = now()
FROM unnest($1::mollifier.new_run[]) AS new
WHERE run.id = new.id AND run.environment_id = new.environment_id AND run.organization_id = new.organization_id
    AND new.applied[cardinality(new.applied)] <> ALL (run.applied)
    AND run.applied <> '{}' AND run.applied[cardinality(run.applied)] <> ALL (new.applied)
