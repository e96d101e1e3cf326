-- Bring rows up to what was changed while they were buffered. They were committed by a drainer that was taken for
-- dead, or by a statement that was cut off, before the last change was made.
-- $1  mollifier.new_run[]
-- Rows that were changed on their own are left to merge_runs.sql.
UPDATE mollifier.runs AS run
SET status = new.status, delay_until = new.delay_until, tags = new.tags, metadata = new.metadata,
    metadata_version = new.metadata_version, cancelled_at = new.cancelled_at, cancel_reason = new.cancel_reason,
    idempotency_key = new.idempotency_key, idempotency_key_expires_at = new.idempotency_key_expires_at,
    revision = new.revision, applied = new.applied, updated_at = now()
FROM unnest($1::mollifier.new_run[]) AS new
WHERE run.id = new.id AND run.environment_id = new.environment_id AND run.organization_id = new.organization_id
    AND run.revision < new.revision AND run.status IN ('DELAYED', 'QUEUED')
    AND (run.applied = '{}' OR run.applied[cardinality(run.applied)] = ANY (new.applied))
