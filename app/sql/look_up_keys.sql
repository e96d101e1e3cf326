-- The live runs that have idempotency keys. A key is free once it expired or its run failed.
-- $1 digests of the keys, as mollifier.key_digest makes them, bytea[]  $2 now, timestamptz
-- Returns the position of a key, from 1 on, and its run; nothing of the other keys.
SELECT wanted.position, run.id, run.span_id, run.delay_until
FROM unnest($1::bytea[]) WITH ORDINALITY AS wanted (digest, position)
JOIN mollifier.runs AS run
    ON run.idempotency_key IS NOT NULL
    AND mollifier.key_digest(run.organization_id, run.environment_id, run.task, run.idempotency_key) = wanted.digest
    AND (run.idempotency_key_expires_at IS NULL OR run.idempotency_key_expires_at > $2)
    AND run.status NOT IN ('FAILED', 'EXPIRED', 'SYSTEM_FAILURE')
