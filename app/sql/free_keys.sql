-- Free the idempotency keys of runs that failed or outlived them, so that a new run can have them.
-- $1 environment ids  $2 tasks  $3 idempotency keys; text[]  $4 now, timestamptz
UPDATE mollifier.runs AS run
SET idempotency_key = NULL, idempotency_key_expires_at = NULL, updated_at = now()
FROM unnest($1::text[], $2::text[], $3::text[]) AS wanted (environment_id, task, idempotency_key)
WHERE run.idempotency_key IS NOT NULL
    AND mollifier.key_digest(run.environment_id, run.task, run.idempotency_key)
        = mollifier.key_digest(wanted.environment_id, wanted.task, wanted.idempotency_key)
    AND (run.idempotency_key_expires_at <= $4 OR run.status IN ('FAILED', 'EXPIRED', 'SYSTEM_FAILURE'))
