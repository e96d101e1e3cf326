-- What stands in the way of runs, or answers them: the row or alias with their id, and the run that has
-- their idempotency key or token.
-- $1 ids  $2 organization ids  $3 environment ids  $4 tasks  $5 idempotency keys  $6 one-time-use tokens; text[]
-- $7 when each was accepted, of which time it is told whether the key is free; timestamptz[]
-- Returns one row per run, in order.
SELECT
    coalesce(own.environment_id, alias.environment_id) AS own_environment_id,
    coalesce(own.organization_id, aliased.organization_id) AS own_organization_id,
    coalesce(own.id, aliased.id) AS own_run_id,
    coalesce(own.span_id, aliased.span_id) AS own_span_id,
    coalesce(own.delay_until, aliased.delay_until) AS own_delay_until,
    own.buffered_at IS NOT NULL OR alias.id IS NOT NULL AS own_is_buffered,
    keyed.id AS winner_id,
    keyed.span_id AS winner_span_id,
    keyed.delay_until AS winner_delay_until,
    coalesce(
        keyed.idempotency_key_expires_at <= wanted.accepted_at
        OR keyed.status IN ('FAILED', 'EXPIRED', 'SYSTEM_FAILURE'),
        false
    ) AS winner_key_is_free,
    used.id IS NOT NULL OR used_by_alias.id IS NOT NULL AS token_is_used
FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::timestamptz[])
    WITH ORDINALITY
    AS wanted (id, organization_id, environment_id, task, idempotency_key, token, accepted_at, position)
LEFT JOIN mollifier.runs AS own ON own.id = wanted.id
LEFT JOIN mollifier.run_aliases AS alias ON alias.id = wanted.id
LEFT JOIN mollifier.runs AS aliased ON aliased.id = alias.run_id
LEFT JOIN mollifier.runs AS keyed
    ON keyed.idempotency_key IS NOT NULL
    AND mollifier.key_digest(keyed.organization_id, keyed.environment_id, keyed.task, keyed.idempotency_key)
        = mollifier.key_digest(
            wanted.organization_id, wanted.environment_id, wanted.task, wanted.idempotency_key
        )
LEFT JOIN mollifier.runs AS used ON used.one_time_use_token = wanted.token
LEFT JOIN mollifier.run_aliases AS used_by_alias ON used_by_alias.one_time_use_token = wanted.token
ORDER BY wanted.position
