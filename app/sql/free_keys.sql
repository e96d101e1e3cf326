-- Free the idempotency keys of runs that failed or outlived them, so that new runs can have them.
-- $1 organization ids  $2 environment ids  $3 tasks  $4 idempotency keys; text[]
-- $5 when each of the new runs was accepted; timestamptz[]
UPDATE mollifier.runs AS run
SET idempotency_key = NULL, idempotency_key_expires_at = NULL, updated_at = now()
FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::timestamptz[])
    AS wanted (organization_id, environment_id, task, idempotency_key, accepted_at)
WHERE run.idempotency_key IS NOT NULL
    AND mollifier.key_digest(run.organization_id, run.environment_id, run.task, run.idempotency_key)
        = mollifier.key_digest(
            wanted.organization_id, wanted.environment_id, wanted.task, wanted.idempotency_key
        )
    AND (
        run.idempotency_key_expires_at <= wanted.accepted_at
        OR run.status IN ('FAILED', 'EXPIRED', 'SYSTEM_FAILURE')
    )
