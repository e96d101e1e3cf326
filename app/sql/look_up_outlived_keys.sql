-- The runs that have the keys of buffered runs which outlived them, and were accepted while those still counted:
-- side by side, without claims. A run that is a row already keeps it.
-- $1 organization ids  $2 environment ids  $3 tasks  $4 idempotency keys  $5 ids; text[]
-- $6 when their runs were accepted  $7 when the keys expired; timestamptz[]
-- Returns one row per key, in order; `id` is null where there is no such run.
SELECT run.id
FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::timestamptz[], $7::timestamptz[])
    WITH ORDINALITY
    AS wanted (
        organization_id, environment_id, task, idempotency_key, id, accepted_at, expires_at, position
    )
LEFT JOIN mollifier.runs AS run
    ON run.idempotency_key IS NOT NULL
    AND mollifier.key_digest(run.organization_id, run.environment_id, run.task, run.idempotency_key)
        = mollifier.key_digest(
            wanted.organization_id, wanted.environment_id, wanted.task, wanted.idempotency_key
        )
    AND coalesce(run.buffered_at, run.materialised_at) < wanted.expires_at
    AND (run.idempotency_key_expires_at IS NULL OR run.idempotency_key_expires_at > wanted.accepted_at)
    AND run.status NOT IN ('FAILED', 'EXPIRED', 'SYSTEM_FAILURE')
    AND NOT EXISTS (SELECT FROM mollifier.runs AS own WHERE own.id = wanted.id)
ORDER BY wanted.position
