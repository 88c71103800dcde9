-- A few contents to look at. Newsletters have no length; one podcast has length 0, and one row has no type.
-- Repeatable: a content that exists is left as it is.

INSERT INTO public.content (id, slug, title, content_type, length_seconds, publish_ts) VALUES
    ('0a5b1f6e-51d0-4c39-9d1f-0f6a3c1e0001', 'falaj-ep-401', 'الساقية: لماذا نتعلم العربية؟', 'podcast', 5400, '2025-01-05 06:00:00+00'),
    ('0a5b1f6e-51d0-4c39-9d1f-0f6a3c1e0002', 'falaj-ep-402', 'الساقية مع «أبي»: حكايات الفلج', 'podcast', 6120, '2025-01-12 06:00:00+00'),
    ('0a5b1f6e-51d0-4c39-9d1f-0f6a3c1e0003', 'madina-ep-77', 'المدينة: كيف تُبنى المدن؟', 'podcast', 3725, '2025-01-14 17:30:00+00'),
    ('0a5b1f6e-51d0-4c39-9d1f-0f6a3c1e0004', 'thulatha-newsletter-12', 'نشرة الثلاثاء – العدد ١٢', 'newsletter', NULL, '2025-01-14 04:00:00+00'),
    ('0a5b1f6e-51d0-4c39-9d1f-0f6a3c1e0005', 'thulatha-newsletter-13', 'نشرة الثلاثاء – العدد ١٣', 'newsletter', NULL, '2025-01-21 04:00:00+00'),
    ('0a5b1f6e-51d0-4c39-9d1f-0f6a3c1e0006', 'irrigation-in-five-minutes', 'Irrigation in five minutes', 'video', 300, '2025-01-20 09:15:00+00'),
    ('0a5b1f6e-51d0-4c39-9d1f-0f6a3c1e0007', 'como-nace-un-rio', '¿Cómo nace un río?', 'video', 1260, '2025-01-22 11:00:00+00'),
    ('0a5b1f6e-51d0-4c39-9d1f-0f6a3c1e0008', 'grosse-fragen-3', 'Große Fragen, kurze Wege: Über Öl und Wasser', 'podcast', 2710, '2025-01-23 05:00:00+00'),
    ('0a5b1f6e-51d0-4c39-9d1f-0f6a3c1e0009', 'mizu-no-michi', '水の道 ― 井戸から海まで', 'video', 3600, '2025-01-24 12:00:00+00'),
    ('0a5b1f6e-51d0-4c39-9d1f-0f6a3c1e000a', 'live-special', 'Live special 🎧 "no length yet"', 'podcast', 0, '2025-01-25 18:00:00+00'),
    ('0a5b1f6e-51d0-4c39-9d1f-0f6a3c1e000b', 'weekly-digest-4', 'The weekly digest, №4', 'newsletter', NULL, '2025-01-26 07:00:00+00'),
    ('0a5b1f6e-51d0-4c39-9d1f-0f6a3c1e000c', 'istoriya-vody', 'История воды: от арыка до канала', 'podcast', 4800, '2025-01-27 06:30:00+00'),
    ('0a5b1f6e-51d0-4c39-9d1f-0f6a3c1e000d', 'untyped-draft', 'Draft without a type', NULL, NULL, '2025-01-28 00:00:00+00')
ON CONFLICT DO NOTHING;
