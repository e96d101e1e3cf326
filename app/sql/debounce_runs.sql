-- Give each debounce key its one delayed run: insert it, or push the one back that is there. Triggers that
-- have no run of their own then become aliases of it.
-- Per key: $1 mollifier.new_run[] what its triggers come to if it has no run  $2 timestamptz[] time of their
-- newest trailing one, null: all are leading  $3 text[] ids in $1  $4 timestamptz[] how far they push it back
-- Per trigger, text[]: $5 ids  $6 organization ids  $7 environment ids  $8 tasks  $9 debounce keys
-- $10 one-time-use tokens
-- Returns per key, in any order, its run.
WITH debounced AS (
    INSERT INTO mollifier.runs AS run (
        id, organization_id, project_id, environment_id, environment_type, task, payload, payload_type, tags,
        idempotency_key, idempotency_key_expires_at, delay_until, ttl_seconds, expires_at, queue,
        concurrency_key, worker_queue, machine, priority, max_attempts, max_duration, locked_to_version,
        is_test, depth, parent_run_id, root_run_id, resume_parent_on_completion, batch_id, batch_index,
        debounce_key, debounce_until, one_time_use_token, replayed_from_run_id, trace_id, span_id,
        parent_span_id, created_at, buffered_at, status, metadata, idempotency_key_options, trace_context,
        cancelled_at, cancel_reason, error, metadata_version, revision, applied, debounced_at
    )
    SELECT new.* FROM unnest($1::mollifier.new_run[], $2::timestamptz[]) AS new
    ON CONFLICT (mollifier.key_digest(organization_id, environment_id, task, debounce_key))
        WHERE debounce_key IS NOT NULL AND status = 'DELAYED'
    DO UPDATE SET
        delay_until = greatest(
            run.delay_until,
            least(($4::timestamptz[])[array_position($3::text[], EXCLUDED.id)], run.debounce_until)
        ),
        (payload, payload_type, debounced_at) = (
            SELECT payload, payload_type, debounced_at
            FROM (VALUES
                (EXCLUDED.payload, EXCLUDED.payload_type, EXCLUDED.debounced_at, true),
                (run.payload, run.payload_type, coalesce(run.debounced_at, run.created_at), false)
            ) AS version (payload, payload_type, debounced_at, is_new)
            ORDER BY debounced_at DESC NULLS LAST, is_new DESC
            LIMIT 1
        ),
        updated_at = now()
    RETURNING run.id, run.organization_id, run.span_id, run.delay_until, run.environment_id, run.task,
        run.debounce_key
),
aliased AS (
    INSERT INTO mollifier.run_aliases (id, run_id, environment_id, one_time_use_token)
    SELECT trigger.id, debounced.id, environment_id, trigger.token
    FROM unnest($5::text[], $6::text[], $7::text[], $8::text[], $9::text[], $10::text[])
        AS trigger (id, organization_id, environment_id, task, debounce_key, token)
    JOIN debounced USING (organization_id, environment_id, task, debounce_key)
    WHERE trigger.id <> debounced.id
    ON CONFLICT (id) DO NOTHING
)
SELECT * FROM debounced
