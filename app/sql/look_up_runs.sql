-- What stands in the way of runs, or answers them: the row or alias with their id, and the run that has
-- their idempotency key, token or debounce key.
-- $1 ids  $2 environment ids  $3 tasks  $4 idempotency keys  $5 one-time-use tokens  $6 debounce keys; text[]
-- $7 now, timestamptz
-- Returns one row per run, in order.
SELECT
    coalesce(own.environment_id, alias.environment_id) AS own_environment_id,
    coalesce(own.organization_id, aliased.organization_id) AS own_organization_id,
    own.buffered_at IS NOT NULL OR alias.id IS NOT NULL AS own_is_buffered,
    own.delay_until AS own_delay_until,
    coalesce(keyed.id, debounced.id) AS winner_id,
    coalesce(keyed.span_id, debounced.span_id) AS winner_span_id,
    coalesce(keyed.delay_until, debounced.delay_until) AS winner_delay_until,
    coalesce(keyed.organization_id, debounced.organization_id) AS winner_organization_id,
    coalesce(
        keyed.idempotency_key_expires_at <= $7 OR keyed.status IN ('FAILED', 'EXPIRED', 'SYSTEM_FAILURE'), false
    ) AS winner_key_is_free,
    EXISTS (SELECT FROM mollifier.runs AS used WHERE used.one_time_use_token = wanted.token) AS token_is_used
FROM unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[]) WITH ORDINALITY
    AS wanted (id, environment_id, task, idempotency_key, token, debounce_key, position)
LEFT JOIN mollifier.runs AS own ON own.id = wanted.id
LEFT JOIN mollifier.run_aliases AS alias ON alias.id = wanted.id
LEFT JOIN mollifier.runs AS aliased ON aliased.id = alias.run_id
LEFT JOIN mollifier.runs AS keyed
    ON keyed.idempotency_key IS NOT NULL
    AND mollifier.key_digest(keyed.environment_id, keyed.task, keyed.idempotency_key)
        = mollifier.key_digest(wanted.environment_id, wanted.task, wanted.idempotency_key)
LEFT JOIN mollifier.runs AS debounced
    ON debounced.debounce_key IS NOT NULL AND debounced.status = 'DELAYED'
    AND mollifier.key_digest(debounced.environment_id, debounced.task, debounced.debounce_key)
        = mollifier.key_digest(wanted.environment_id, wanted.task, wanted.debounce_key)
ORDER BY wanted.position
