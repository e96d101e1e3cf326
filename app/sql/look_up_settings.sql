-- All that operators have decided, at one moment.
-- Returns one JSON object with the fields of switches.OperatorSettings
SELECT json_build_object(
    'revision', (SELECT coalesce(max(id), 0) FROM mollifier.audit),
    'switch', (SELECT value FROM mollifier.settings WHERE name = 'switch'),
    'drain_paused', coalesce((SELECT value FROM mollifier.settings WHERE name = 'drain.paused'), 'false'),
    'drain_rate', (SELECT value FROM mollifier.settings WHERE name = 'drain.rate'),
    'enrolment', (
        SELECT coalesce(json_object_agg(organization_id, enrolled), '{}')
        FROM mollifier.organization_settings WHERE enrolled IS NOT NULL
    ),
    'weights', (
        SELECT coalesce(json_object_agg(organization_id, weight), '{}')
        FROM mollifier.organization_settings WHERE weight <> 1
    ),
    'environments', (
        SELECT coalesce(json_object_agg(id, json_build_array(window_ms, threshold, hold_ms)), '{}')
        FROM mollifier.gate_settings WHERE scope = 'environment'
    ),
    'organizations', (
        SELECT coalesce(json_object_agg(id, json_build_array(window_ms, threshold, hold_ms)), '{}')
        FROM mollifier.gate_settings WHERE scope = 'organization'
    )
)
