-- The live runs that have idempotency keys. A key is free once it expired or its run failed.
-- $1 organization ids  $2 environment ids  $3 tasks  $4 idempotency keys; text[]  $5 now, timestamptz
-- Returns one row per key, in order; `id` is null where no live run has it.
SELECT run.id, run.span_id, run.delay_until
FROM unnest($1::text[], $2::text[], $3::text[], $4::text[]) WITH ORDINALITY
    AS wanted (organization_id, environment_id, task, idempotency_key, position)
LEFT JOIN mollifier.runs AS run
    ON run.idempotency_key IS NOT NULL
    AND mollifier.key_digest(run.organization_id, run.environment_id, run.task, run.idempotency_key)
        = mollifier.key_digest(
            wanted.organization_id, wanted.environment_id, wanted.task, wanted.idempotency_key
        )
    AND (run.idempotency_key_expires_at IS NULL OR run.idempotency_key_expires_at > $5)
    AND run.status NOT IN ('FAILED', 'EXPIRED', 'SYSTEM_FAILURE')
ORDER BY wanted.position
