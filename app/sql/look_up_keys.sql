-- The live runs that have idempotency keys, and runs by id. A key is free once it expired or its run failed.
-- $1 digests of the keys, as mollifier.key_digest makes them, bytea[]  $2 now, timestamptz  $3 ids, text[]
-- Returns the position of a key, from 1 on, and its run, nothing of the other keys; and, without a position, what
-- is there of the ids. One that lost its key to another run is still itself.
SELECT wanted.position, run.id, run.span_id, run.delay_until, run.buffered_at IS NOT NULL AS is_buffered
FROM unnest($1::bytea[]) WITH ORDINALITY AS wanted (digest, position)
JOIN mollifier.runs AS run
    ON run.idempotency_key IS NOT NULL
    AND mollifier.key_digest(run.organization_id, run.environment_id, run.task, run.idempotency_key) = wanted.digest
    AND (run.idempotency_key_expires_at IS NULL OR run.idempotency_key_expires_at > $2)
    AND run.status NOT IN ('FAILED', 'EXPIRED', 'SYSTEM_FAILURE')
UNION ALL
SELECT
    NULL,
    wanted.id,
    own.span_id,
    coalesce(own.delay_until, aliased.delay_until),
    own.buffered_at IS NOT NULL OR alias.id IS NOT NULL
FROM unnest($3::text[]) AS wanted (id)
LEFT JOIN mollifier.runs AS own ON own.id = wanted.id
LEFT JOIN mollifier.run_aliases AS alias ON alias.id = wanted.id
LEFT JOIN mollifier.runs AS aliased ON aliased.id = alias.run_id
WHERE own.id IS NOT NULL OR aliased.id IS NOT NULL
