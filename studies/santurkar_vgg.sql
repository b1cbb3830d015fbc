-- Queries of studies/santurkar_vgg.py. Three tables are not the store's: `plan` has one row per trial of the preset; `chosen`
-- one row per trial with a result; `student` the 97.5 % quantile t95 of Student's t for n readings. A query that selects from
-- another of this file gets it as a CTE. Where a loss or a gradient left the float32 numbers it is infinite: medians and
-- largest values keep that, and what is averaged counts it as 1e30.

-- name: settings
-- One row per trial with a result: its norm as `kind`, the paper's names of its line, and whether it is the paper's training:
-- but for the augmentation (`alike`), up to its last step (`papers`), planned over the paper's 15,000 steps (`entire`), and come
-- to their end (`whole`). A setting with several trials a seed, because another field was given several values, is left out:
-- these are no repeats.
select
    trial,
    seed,
    lr,
    steps,
    norm || case when placement in ('every', 'none') then '' else ' at ' || placement end as kind,
    kind || ' ' || format('{:g}', lr) as line,
    outcome,
    data = 'cifar10'
    and label_noise = 0
    and network = 'vgg'
    and depth = 16
    and width = 4
    and batch = 128
    and norm_batch = batch
    and validation = 0
    and trainable = 'all'
    and weight_init = 'glorot_uniform'
    and output_bias = 'random'
    and norm_init = 'ones'
    and affine = 'both'
    and affine_at = if(norm in ('none', 'noise'), 'none', 'every')
    and momentum = 0
    and weight_decay = 0
    and coalesce(norm_decay, 0) = 0
    and gamma_l1 + gamma_l2 + beta_l1 + beta_l2 = 0
    and warmup = 0
    and len(milestones) = 0
    and plateau is null
    and precision = 'fp32' as alike,
    augmentation,
    alike and augmentation = 'none' as papers,
    papers and steps = 15000 as entire,
    entire and outcome = 'finished' as whole
from chosen
join trials using (trial)
where steps > 0
qualify count(*) over (partition by kind, lr, seed) = 1
order by kind, lr, seed

-- name: enough
-- One row: the seeds that a comparison takes. One where every training is the paper's over all its steps, since the paper has
-- one of each; three anywhere else. A comparison of fewer has no row.
select if(bool_and(entire), 1, 3) as seeds
from settings

-- name: first_seed
-- One row per norm and rate: the trial of its first seed, for pictures of a single network.
select kind, lr, arg_min(trial, seed) as trial
from settings
group by kind, lr

-- --- Figures 1, 2 and 5: training and test accuracy ------------------------------------------------------------------

-- name: batch_accuracy
-- One row per norm, rate and step: accuracy on the next mini-batch, mean over seeds, and at the last step of a line the share
-- of its trials that diverged.
with
-- one row per norm and rate
lost as (
    select kind, lr, avg((outcome = 'diverged')::int) as diverged
    from settings
    group by kind, lr
)

select
    kind,
    lr,
    line,
    batch_curve.step,
    count(accuracy) as n,
    avg(accuracy) as accuracy,
    if(batch_curve.step = max(batch_curve.step) over (partition by kind, lr), diverged, 0) as diverged
from batch_curve
join settings using (trial)
join lost using (kind, lr)
group by kind, lr, line, batch_curve.step, diverged
order by kind, lr, batch_curve.step

-- name: training_by_rate
-- The same for the two networks that the paper compares over rates.
select line, step, n, accuracy, diverged
from batch_accuracy
where kind in ('none', 'batch') and step > 0
order by line, step

-- name: training_from_the_start
-- The same in a panel for each rate.
select 'rate ' || format('{:g}', lr) as panel, kind, step, n, accuracy
from batch_accuracy
where kind in ('none', 'batch') and lr in (0.1, 0.5, 0.01) and step > 0
order by list_position([0.1, 0.5, 0.01], lr), kind, step

-- name: training_with_noise
-- The same for noise, at rate 0.1.
select kind, step, n, accuracy, diverged
from batch_accuracy
where kind in ('none', 'batch', 'noisy', 'noise') and lr = 0.1 and step > 0
order by kind, step

-- name: training_with_lp
-- The same for l_p norms, at rate 0.1.
select kind, step, n, accuracy, diverged
from batch_accuracy
where kind in ('none', 'batch', 'l1', 'l2', 'linf') and lr = 0.1 and step > 0
order by kind, step

-- name: test_by_rate
-- One row per norm, rate and step: accuracy on test images over seeds with its 95 % interval.
with
-- one row per norm, rate and step
over_seeds as (
    select
        kind,
        line,
        curve.step,
        count(accuracy) as n,
        avg(accuracy) as accuracy,
        stddev_samp(accuracy) / sqrt(count(accuracy)) as error
    from curve
    join settings using (trial)
    where split = 'test' and curve.step > 0
    group by kind, line, curve.step
)

select
    kind,
    line,
    step,
    n,
    accuracy,
    if(n > 1, greatest(0, accuracy - t95 * error), null) as low,
    if(n > 1, least(1, accuracy + t95 * error), null) as high
from over_seeds
left join student using (n)
where kind in ('none', 'batch')
order by line, step

-- name: test_accuracy_on_cifar10
-- One row per norm, rate and step that the paper is read at: test accuracy over seeds.
with
-- one row per norm, rate and step
over_seeds as (
    select
        kind,
        lr,
        curve.step,
        avg(accuracy) as measured,
        count(accuracy) as n,
        stddev_samp(accuracy) / sqrt(count(accuracy)) as error
    from curve
    join settings using (trial)
    where split = 'test' and curve.step in (1000, 3000, 15000) and papers
    group by kind, lr, curve.step
)

select
    kind,
    lr,
    step,
    measured,
    n,
    if(n > 1, greatest(0, measured - t95 * error), null) as low,
    if(n > 1, least(1, measured + t95 * error), null) as high
from over_seeds
left join student using (n)
order by kind, lr, step

-- name: never_trains_on_cifar10
-- One row per norm and rate: the largest test accuracy of the whole training after its first update, or of what there is of
-- it before it diverged, mean over seeds.
with
-- one row per trial
by_trial as (
    select trial, max(accuracy) as accuracy
    from curve
    where split = 'test' and step > 0
    group by trial
)

select kind, lr, avg(accuracy) as measured, count(accuracy) as n
from settings
join by_trial using (trial)
where entire
group by kind, lr
order by kind, lr

-- name: test_accuracy_with_augmentation
-- One row per norm at rate 0.1: test accuracy at the end of the paper's training on randomly shifted and mirrored images, over
-- seeds.
with
-- one row per norm
over_seeds as (
    select
        kind,
        avg(accuracy) as measured,
        count(accuracy) as n,
        stddev_samp(accuracy) / sqrt(count(accuracy)) as error
    from curve
    join settings using (trial)
    where
        split = 'test'
        and curve.step = 15000
        and lr = 0.1
        and alike
        and augmentation = 'flip_shift'
        and steps = 15000
        and outcome = 'finished'
    group by kind
)

select
    kind,
    measured,
    n,
    if(n > 1, greatest(0, measured - t95 * error), null) as low,
    if(n > 1, least(1, measured + t95 * error), null) as high
from over_seeds
left join student using (n)
order by kind

-- name: five_points
-- One row per trial and reading with two before it and two behind: mean mini-batch accuracy of these five.
select trial, step, avg(accuracy) over around as accuracy
from batch_curve
window around as (partition by trial order by step rows between 2 preceding and 2 following)
qualify count(accuracy) over around = 5

-- name: reaching
-- One row per trial and level: the first step at which five readings in a row have a mean mini-batch accuracy of that level;
-- NULL where the training never has.
select settings.trial, seed, kind, lr, steps, entire, level, min(step) filter (where accuracy >= level) as reached
from settings
cross join (values (0.8), (0.9), (0.95)) as levels (level)
left join five_points using (trial)
group by all

-- name: steps_to_on_cifar10
-- One row per norm and level at rate 0.1: that step over seeds. A whole training that never reaches it counts with all its
-- steps: the number is then a lower bound.
with
-- one row per norm and level
over_seeds as (
    select
        kind,
        level,
        avg(coalesce(reached, steps)) as measured,
        count(*) as n,
        stddev_samp(coalesce(reached, steps)) / sqrt(count(*)) as error
    from reaching
    where entire and lr = 0.1
    group by kind, level
)

select kind, level::double as level, measured, n, measured - t95 * error as low, measured + t95 * error as high
from over_seeds
left join student using (n)
order by kind, level

-- name: speeds
-- One row per pair of norms at rate 0.1: steps to a mini-batch accuracy of 90 % with the first over those with the second,
-- geometric mean over the seeds in which at least one of them comes so far. One that does not counts with all its steps.
with
-- one row per norm and seed
by_seed as (
    select kind, seed, reached, greatest(coalesce(reached, steps), 1) as steps
    from reaching
    where level = 0.9 and lr = 0.1
),

-- one row per pair
over_seeds as (
    select
        one.kind as kind,
        other.kind as against,
        avg(ln(one.steps / other.steps)) as mean,
        count(*) as n,
        stddev_samp(ln(one.steps / other.steps)) / sqrt(count(*)) as error
    from by_seed as one
    join by_seed as other using (seed)
    where coalesce(one.reached, other.reached) is not null and one.kind <> other.kind
    group by one.kind, other.kind
)

select kind, against, exp(mean) as measured, n, exp(mean - t95 * error) as low, exp(mean + t95 * error) as high
from over_seeds
left join student using (n)
where n >= (select seeds from enough)
order by kind, against

-- name: best_in_training
-- One row per norm and rate: the highest mean accuracy of five mini-batch readings in a row, of the whole training or of what
-- there is before it diverged; over the seeds in which batch norm at 0.1 comes to 80 %, so that there was time to learn.
with
-- one row per trial
highest as (
    select trial, max(accuracy) as best
    from five_points
    group by trial
),

-- one row per norm and rate
over_seeds as (
    select kind, lr, avg(best) as measured, count(best) as n, stddev_samp(best) / sqrt(count(best)) as error
    from settings
    join highest using (trial)
    where seed in (select seed from reaching where kind = 'batch' and lr = 0.1 and level = 0.8 and reached is not null)
    group by kind, lr
)

select
    kind,
    lr,
    measured,
    n,
    if(n > 1, greatest(0, measured - t95 * error), null) as low,
    if(n > 1, least(1, measured + t95 * error), null) as high
from over_seeds
left join student using (n)
where n >= (select seeds from enough)
order by kind, lr

-- name: training_at_1k_on_cifar10
-- One row per norm at rate 0.1: mini-batch accuracy around step 1,000, mean over the five readings from 800 to 1,200, over
-- seeds.
with
-- one row per norm
over_seeds as (
    select kind, avg(accuracy) as measured, count(*) as n, stddev_samp(accuracy) / sqrt(count(*)) as error
    from five_points
    join settings using (trial)
    where step = 1000 and lr = 0.1 and papers
    group by kind
)

select
    kind,
    measured,
    n,
    if(n > 1, greatest(0, measured - t95 * error), null) as low,
    if(n > 1, least(1, measured + t95 * error), null) as high
from over_seeds
left join student using (n)
order by kind

-- name: final_training_on_cifar10
-- One row per norm at rate 0.1: mini-batch accuracy at the end, mean over the last 20 readings, over seeds.
with
-- one row per trial and reading of the last 20
last_readings as (
    select trial, accuracy
    from batch_curve
    qualify row_number() over (partition by trial order by step desc) <= 20
),

-- one row per trial
by_trial as (
    select trial, avg(accuracy) as accuracy
    from last_readings
    group by trial
    having count(accuracy) = 20
),

-- one row per norm
over_seeds as (
    select kind, avg(accuracy) as measured, count(*) as n, stddev_samp(accuracy) / sqrt(count(*)) as error
    from by_trial
    join settings using (trial)
    where whole and lr = 0.1
    group by kind
)

select
    kind,
    measured,
    n,
    if(n > 1, greatest(0, measured - t95 * error), null) as low,
    if(n > 1, least(1, measured + t95 * error), null) as high
from over_seeds
left join student using (n)
order by kind

-- --- Figures 2 and 8: how much noise there is ------------------------------------------------------------------------

-- name: changes_of_moments
-- One row per trial at rate 0.1, layer and moment: mean change from one update to the next, over the readings.
select
    trial,
    kind,
    seed,
    layer_index,
    moment,
    avg(if(moment = 'mean', mean_change, variance_change)) as change,
    max(if(moment = 'mean', mean_change, variance_change)) as largest,
    whole
from moment_change
join settings using (trial)
cross join (values ('mean'), ('variance')) as moments (moment)
where lr = 0.1
group by all

-- name: changes_by_step
-- One row per norm that the paper compares, layer, moment and step: change from one update to the next, over seeds.
select
    'layer ' || layer_index || ', ' || moment as panel,
    layer_index,
    moment,
    kind,
    moment_change.step,
    avg(if(moment = 'mean', mean_change, variance_change)) as change,
    count(*) as n
from moment_change
join settings using (trial)
cross join (values ('mean'), ('variance')) as moments (moment)
where lr = 0.1 and kind in ('none', 'batch', 'noisy')
group by layer_index, moment, kind, moment_change.step
order by moment, layer_index, kind, moment_change.step

-- name: sizes_of_noise
-- One row per norm, layer and moment: mean change from one update to the next, over the training and seeds.
select
    moment || ', ' || ['early', 'middle', 'late'][dense_rank() over (order by layer_index)] as place,
    kind,
    layer_index,
    moment,
    avg(change) as change,
    count(*) as n
from changes_of_moments
group by kind, layer_index, moment
order by moment, layer_index, kind

-- name: noise_on_cifar10
-- One row per norm and moment: change from one update to the next over the paper's training, geometric mean over layers and
-- over seeds.
with
-- one row per norm, moment and seed
by_seed as (
    select kind, moment, seed, avg(ln(change)) as mean
    from changes_of_moments
    where whole and change > 0
    group by kind, moment, seed
),

-- one row per norm and moment
over_seeds as (
    select kind, moment, avg(mean) as mean, count(*) as n, stddev_samp(mean) / sqrt(count(*)) as error
    from by_seed
    group by kind, moment
)

select kind, moment, exp(mean) as measured, n, exp(mean - t95 * error) as low, exp(mean + t95 * error) as high
from over_seeds
left join student using (n)
order by kind, moment

-- name: largest_noise_on_cifar10
-- One row per norm and moment: the same in the layer where it is largest, mean over seeds.
with
-- one row per norm, moment and layer
by_layer as (
    select kind, moment, layer_index, avg(change) as change, count(*) as n
    from changes_of_moments
    where whole
    group by kind, moment, layer_index
)

select kind, moment, max(change) as measured, min(n) as n
from by_layer
group by kind, moment
order by kind, moment

-- name: noise_of_the_algorithm
-- One row per moment: change from one update to the next with noisy batch norm, over layers, training and seeds.
with
-- one row per moment and seed
by_seed as (
    select moment, seed, avg(change) as change
    from changes_of_moments
    where kind = 'noisy'
    group by moment, seed
),

-- one row per moment
over_seeds as (
    select moment, avg(change) as measured, count(*) as n, stddev_samp(change) / sqrt(count(*)) as error
    from by_seed
    group by moment
)

select moment, measured, n, measured - t95 * error as low, measured + t95 * error as high
from over_seeds
left join student using (n)
where n >= (select seeds from enough)
order by moment

-- name: change_against_standard
-- One row per norm and moment: change from one update to the next over that without norm, geometric mean over the layers and
-- over seeds.
with
-- one row per norm, moment and seed
by_seed as (
    select one.kind, moment, seed, avg(ln(one.change / other.change)) as ratio
    from changes_of_moments as one
    join changes_of_moments as other using (moment, seed, layer_index)
    where one.kind <> 'none' and other.kind = 'none' and one.change > 0 and other.change > 0
    group by one.kind, moment, seed
),

-- one row per norm and moment
over_seeds as (
    select kind, moment, avg(ratio) as mean, count(*) as n, stddev_samp(ratio) / sqrt(count(*)) as error
    from by_seed
    group by kind, moment
)

select kind, moment, exp(mean) as measured, n, exp(mean - t95 * error) as low, exp(mean + t95 * error) as high
from over_seeds
left join student using (n)
where n >= (select seeds from enough)
order by kind, moment

-- --- Figures 1, 2 and 14: distributions ------------------------------------------------------------------------------

-- name: distributions_over_training
-- One row per layer, place, norm, step and interval: share of the values of a layer at rate 0.1, at about ten steps of the
-- first seed.
with
-- one row per trial and reading
readings as (
    select
        trial,
        step,
        row_number() over (partition by trial order by step) - 1 as number,
        count(*) over (partition by trial) as readings
    from (select distinct trial, step from activation_histogram)
)

select
    'layer ' || layer_index || ', '
    || case kind when 'none' then 'standard' when 'batch' then 'batch norm' else 'noisy batch norm' end as panel,
    place,
    kind,
    layer_index,
    step,
    low,
    high,
    count / "values" as share
from activation_histogram
join first_seed using (trial)
join readings using (trial, step)
where kind in ('none', 'batch', 'noisy') and lr = 0.1 and number % ceil(greatest(readings - 1, 1) / 9)::bigint = 0
order by place, layer_index, case kind when 'none' then 1 when 'batch' then 2 else 3 end, step, low

-- name: inputs_over_training
-- The same for what a layer gets, without the lowest interval, which holds the zeros that ReLU leaves.
select *
from distributions_over_training
where place = 'input' and low > 0

-- name: outputs_over_training
-- The same for what a layer hands to the nonlinearity.
select *
from distributions_over_training
where place = 'output'

-- name: activations_at_the_end
-- One row per norm, layer and interval: share of what the layer hands to the nonlinearity, at rate 0.1, at the last reading of
-- the first seed. The deepest layer read.
select
    case kind
        when 'none' then 'standard'
        when 'batch' then 'batch norm'
        when 'noisy' then 'noisy batch norm'
        when 'noise' then 'noise, no norm'
        when 'linf' then 'l_inf norm'
        else 'l_' || kind[2] || ' norm'
    end || ', layer ' || layer_index as panel,
    kind,
    layer_index,
    step,
    low,
    high,
    count / "values" as share
from activation_histogram
join first_seed using (trial)
where place = 'output' and lr = 0.1
qualify
    step = max(step) over (partition by trial)
    and layer_index = max(layer_index) over (partition by trial)
order by list_position(['none', 'batch', 'l1', 'l2', 'linf', 'noisy', 'noise'], kind), low

-- name: distances_from_normal
-- One row per norm and layer at rate 0.1: Kolmogorov's distance between what a layer hands to the nonlinearity and a normal
-- distribution, mean over the readings after the first update, and over seeds.
with
-- one row per trial and layer
by_trial as (
    select trial, layer_index, avg(from_normal) as distance
    from activations
    where place = 'output' and step > 0
    group by trial, layer_index
),

-- one row per norm and layer
over_seeds as (
    select
        kind,
        layer_index,
        avg(distance) as distance,
        count(distance) as n,
        stddev_samp(distance) / sqrt(count(distance)) as error
    from by_trial
    join settings using (trial)
    where lr = 0.1
    group by kind, layer_index
)

select
    'layer ' || layer_index as place,
    kind,
    layer_index,
    distance,
    n,
    if(n > 1, greatest(0, distance - t95 * error), null) as low,
    if(n > 1, least(1, distance + t95 * error), null) as high
from over_seeds
left join student using (n)
order by layer_index, kind

-- name: less_normal_than_batch
-- One row per norm at rate 0.1: the same distance over that with batch norm, geometric mean over the layers and over seeds.
with
-- one row per norm, seed and layer
by_layer as (
    select kind, seed, layer_index, avg(from_normal) as distance
    from activations
    join settings using (trial)
    where place = 'output' and activations.step > 0 and lr = 0.1
    group by kind, seed, layer_index
),

-- one row per norm and seed
by_seed as (
    select one.kind, seed, avg(ln(one.distance / other.distance)) as ratio
    from by_layer as one
    join by_layer as other using (seed, layer_index)
    where other.kind = 'batch' and one.kind <> 'batch' and one.distance > 0 and other.distance > 0
    group by one.kind, seed
),

-- one row per norm
over_seeds as (
    select kind, avg(ratio) as mean, count(*) as n, stddev_samp(ratio) / sqrt(count(*)) as error
    from by_seed
    group by kind
)

select kind, exp(mean) as measured, n, exp(mean - t95 * error) as low, exp(mean + t95 * error) as high
from over_seeds
left join student using (n)
where n >= (select seeds from enough)
order by kind

-- name: drifts
-- One row per trial at rate 0.1, layer and reading but the first: how far the distribution of what the layer hands to the
-- nonlinearity is from that of the reading before: mean distance of nineteen quantiles, from 5 to 95 %, which is about the
-- (first) Wasserstein distance. In units of its standard deviation, for layers of different norms have different scales.
with
-- one row per trial, layer, step and interval: values up to its ends
intervals as (
    select
        *,
        sum(count) over up as upto,
        sum(count) over (partition by trial, layer_index, step) as total
    from activation_histogram
    where place = 'output'
    window up as (partition by trial, layer_index, step order by low)
),

-- one row per trial, layer, step and quantile
quantiles as (
    select trial, layer_index, step, twentieth, low + (high - low) * (twentieth * total / 20 - upto + count) / count as x
    from intervals
    join range(1, 20) as levels (twentieth) on twentieth * total / 20 > upto - count and twentieth * total / 20 <= upto
),

-- the same with the distance from the reading before
moves as (
    select *, abs(x - lag(x) over (partition by trial, layer_index, twentieth order by step)) as moved
    from quantiles
)

select trial, kind, seed, layer_index, moves.step, avg(moved) / sd as drift
from moves
join settings using (trial)
join activations using (trial, layer_index, step)
where lr = 0.1 and moved is not null and place = 'output' and sd > 0
group by trial, kind, seed, layer_index, moves.step, sd

-- name: drift_against_standard
-- One row per norm at rate 0.1: mean drift over the training over that without norm, geometric mean over the layers and over
-- seeds.
with
-- one row per norm, seed and layer
by_layer as (
    select kind, seed, layer_index, avg(drift) as drift
    from drifts
    where drift < 1e30
    group by kind, seed, layer_index
),

-- one row per norm and seed
by_seed as (
    select one.kind, seed, avg(ln(one.drift / other.drift)) as ratio
    from by_layer as one
    join by_layer as other using (seed, layer_index)
    where other.kind = 'none' and one.kind <> 'none' and one.drift > 0 and other.drift > 0
    group by one.kind, seed
),

-- one row per norm
over_seeds as (
    select kind, avg(ratio) as mean, count(*) as n, stddev_samp(ratio) / sqrt(count(*)) as error
    from by_seed
    group by kind
)

select kind, exp(mean) as measured, n, exp(mean - t95 * error) as low, exp(mean + t95 * error) as high
from over_seeds
left join student using (n)
where n >= (select seeds from enough)
order by kind

-- --- Figure 3: internal covariate shift ------------------------------------------------------------------------------

-- name: shift_by_step
-- One row per norm that the paper compares, rate, layer and step: the change of the gradient, geometric mean over seeds, and
-- its cosine, mean over seeds. A layer without a gradient has neither.
select
    'layer ' || layer_index || ', rate ' || format('{:g}', lr) as panel,
    kind,
    lr,
    layer_index,
    covariate_shift.step,
    exp(avg(ln(least(l2, 1e30))) filter (where l2 > 0)) as l2,
    avg(cosine) as cosine,
    count(*) as n
from covariate_shift
join settings using (trial)
where kind in ('none', 'batch') and lr in (0.1, 0.01)
group by kind, lr, layer_index, covariate_shift.step
order by lr desc, layer_index, kind, covariate_shift.step

-- name: cosine_by_step
-- The same where some seed has a cosine, in the order of the figure.
select panel, kind, step, cosine, n
from shift_by_step
where cosine is not null
order by lr desc, layer_index, kind, step

-- name: shift_by_trial
-- One row per trial and layer: geometric mean of the change of the gradient over the training, the mean cosine, and the change
-- at the first reading.
select
    trial,
    kind,
    lr,
    seed,
    papers,
    whole,
    layer_index,
    exp(avg(ln(least(l2, 1e30))) filter (where l2 > 0)) as l2,
    avg(cosine) as cosine,
    max(l2) filter (where covariate_shift.step = 0) as at_the_start
from covariate_shift
join settings using (trial)
group by all

-- name: shift_over_training
-- One row per norm that the paper compares, rate and layer: both, over seeds.
select
    ['early', 'middle', 'late'][dense_rank() over (order by layer_index)] || ', rate ' || format('{:g}', lr) as place,
    kind,
    lr,
    layer_index,
    exp(avg(ln(l2))) as l2,
    avg(cosine) as cosine,
    count(*) as n
from shift_by_trial
where kind in ('none', 'batch') and lr in (0.1, 0.01)
group by kind, lr, layer_index
order by lr desc, layer_index, kind

-- name: shift_on_cifar10
-- One row per norm, rate, layer and reading, over seeds: the change of the gradient over the paper's training ('l2') and
-- before its first update ('l2 at the start'), geometric means, and the cosine.
with
-- one row per norm, rate, layer and reading
over_seeds as (
    select
        kind,
        lr,
        layer_index,
        reading,
        avg(case reading when 'cosine' then cosine when 'l2' then ln(l2) else ln(least(at_the_start, 1e30)) end) as mean,
        stddev_samp(case reading when 'cosine' then cosine when 'l2' then ln(l2) else ln(least(at_the_start, 1e30)) end)
            / sqrt(count(*)) as error,
        count(*) as n
    from shift_by_trial
    cross join (values ('l2'), ('cosine'), ('l2 at the start')) as readings (reading)
    where papers and (whole or reading = 'l2 at the start') and l2 > 0 and at_the_start > 0
    group by kind, lr, layer_index, reading
)

select
    kind,
    lr,
    layer_index,
    reading,
    if(reading = 'cosine', mean, exp(mean)) as measured,
    n,
    if(reading = 'cosine', mean - t95 * error, exp(mean - t95 * error)) as low,
    if(reading = 'cosine', mean + t95 * error, exp(mean + t95 * error)) as high
from over_seeds
left join student using (n)
order by kind, lr, layer_index, reading

-- name: shift_with_batch_norm
-- One row per reading at rate 0.1: the change of the gradient with batch norm over that without, geometric mean over the layers
-- but the second, which stands behind a single one ('l2'); and by how much its cosine is higher ('cosine'); over seeds.
with
-- one row per seed and layer
by_layer as (
    select
        seed,
        layer_index,
        max(l2) filter (where kind = 'batch') / max(l2) filter (where kind = 'none') as l2,
        max(cosine) filter (where kind = 'batch') - max(cosine) filter (where kind = 'none') as cosine
    from shift_by_trial
    where lr = 0.1 and layer_index > 2
    group by seed, layer_index
),

-- one row per reading and seed
by_seed as (
    select seed, reading, avg(if(reading = 'l2', ln(nullif(l2, 0)), cosine)) as change
    from by_layer
    cross join (values ('l2'), ('cosine')) as readings (reading)
    group by seed, reading
),

-- one row per reading
over_seeds as (
    select reading, avg(change) as mean, count(change) as n, stddev_samp(change) / sqrt(count(change)) as error
    from by_seed
    group by reading
)

select
    reading,
    if(reading = 'l2', exp(mean), mean) as measured,
    n,
    if(reading = 'l2', exp(mean - t95 * error), mean - t95 * error) as low,
    if(reading = 'l2', exp(mean + t95 * error), mean + t95 * error) as high
from over_seeds
left join student using (n)
where n >= (select seeds from enough)
order by reading

-- --- Figure 4: the landscape along the gradient ----------------------------------------------------------------------

-- name: along_the_gradient
-- One row per trial and step, over the step sizes: least and largest loss and change of the gradient, and the largest change
-- per distance, which is the effective beta. At most 1e30 each.
select
    trial,
    kind,
    lr,
    seed,
    settings.steps,
    papers,
    whole,
    landscape.step,
    min(loss_before) as loss_before,
    min(least(loss, 1e30)) as least_loss,
    max(least(loss, 1e30)) as largest_loss,
    if(largest_loss >= 1e30, 1e30, largest_loss - least_loss) as variation,
    min(least(gradient_change, 1e30)) as least_change,
    max(least(gradient_change, 1e30)) as largest_change,
    max(least(beta, 1e30)) as beta
from landscape
join settings using (trial)
group by all

-- name: landscape_by_step
-- One row per norm that the paper compares and step at rate 0.1: geometric means over seeds, infinite where a seed left the
-- float32 numbers.
with
-- one row per norm and step: logarithms
over_seeds as (
    select
        kind,
        step,
        avg(ln(nullif(loss_before, 0))) as loss_before,
        avg(ln(nullif(least_loss, 0))) as least_loss,
        avg(ln(nullif(largest_loss, 0))) as largest_loss,
        avg(ln(nullif(least_change, 0))) as least_change,
        avg(ln(nullif(largest_change, 0))) as largest_change,
        avg(ln(nullif(beta, 0))) as beta,
        max(largest_loss) >= 1e30 as lost,
        max(largest_change) >= 1e30 as lost_change,
        count(*) as n
    from along_the_gradient
    where kind in ('none', 'batch') and lr = 0.1
    group by kind, step
)

select
    'rate 0.1' as panel,
    kind,
    step,
    exp(loss_before) as loss_before,
    exp(least_loss) as least,
    if(lost, 'infinity'::double, exp(largest_loss)) as largest,
    exp(least_change) as least_change,
    if(lost_change, 'infinity'::double, exp(largest_change)) as largest_change,
    if(lost_change, 'infinity'::double, exp(beta)) as beta,
    n
from over_seeds
order by kind, step

-- name: loss_along_the_gradient
-- The loss: at the network itself, and the least and largest on the way.
select panel, kind, step, loss_before, least, largest, n
from landscape_by_step
order by kind, step

-- name: gradient_along_the_gradient
-- The change of the gradient: the least and largest on the way.
select panel, kind, step, sqrt(least_change * largest_change) as middle, least_change as least, largest_change as largest, n
from landscape_by_step
order by kind, step

-- name: beta_along_the_gradient
-- The effective beta.
select panel, kind, step, beta, n
from landscape_by_step
order by kind, step

-- name: landscape_by_trial
-- One row per trial: over its training, medians and largest values. `early` is the first fifth, the paper's 3,000 steps, and
-- the dip is between a thirtieth and a fifteenth of the training, the paper's steps 500 to 1,000.
select
    trial,
    kind,
    lr,
    seed,
    papers,
    whole,
    median(variation) as variation,
    max(largest_loss) as largest_loss,
    median(largest_change) as change,
    max(largest_change) as largest_change,
    avg(largest_change) filter (where step <= steps / 5) as early_change,
    max(largest_change) filter (where step > steps / 5) as late_change,
    median(beta) as beta,
    stddev_samp(beta) as deviation_of_beta,
    max(beta) as largest_beta,
    min(beta) filter (where step between steps / 30 and steps / 15) as dip_of_beta
from along_the_gradient
group by trial, kind, lr, seed, papers, whole

-- name: landscape_readings
-- One row per trial and reading.
select trial, kind, lr, seed, papers, whole, reading, value
from landscape_by_trial
unpivot (
    value for reading in (
        variation, largest_loss, change, largest_change, early_change, late_change, beta, deviation_of_beta, largest_beta,
        dip_of_beta
    )
)

-- name: landscape_in_numbers
-- One row per norm and reading at rate 0.1: geometric mean over seeds.
select
    case reading
        when 'variation' then 'loss: median range'
        when 'change' then 'gradient: median change'
        when 'largest_change' then 'gradient: largest change'
        when 'beta' then 'beta: median'
        when 'largest_beta' then 'beta: largest'
    end as quantity,
    kind,
    exp(avg(ln(value))) as value,
    count(*) as n
from landscape_readings
where lr = 0.1 and kind <> 'noise' and quantity is not null and value > 0
group by quantity, reading, kind
order by list_position(['variation', 'change', 'largest_change', 'beta', 'largest_beta'], reading), kind

-- name: landscape_on_cifar10
-- One row per norm and reading at rate 0.1, over the paper's training: geometric mean over seeds.
with
-- one row per norm and reading
over_seeds as (
    select
        kind,
        reading,
        avg(ln(value)) as mean,
        count(*) as n,
        stddev_samp(ln(value)) / sqrt(count(*)) as error
    from landscape_readings
    where whole and lr = 0.1 and value > 0
    group by kind, reading
)

select kind, reading, exp(mean) as measured, n, exp(mean - t95 * error) as low, exp(mean + t95 * error) as high
from over_seeds
left join student using (n)
order by kind, reading

-- name: early_change_on_cifar10
-- Two rows, one for what the paper's text says and one for what its figure shows, with one number: change of the gradient
-- without norm over that with batch norm, in the first fifth of the paper's training at rate 0.1; geometric mean over seeds.
with
-- one row per seed
by_seed as (
    select
        seed,
        ln(max(value) filter (where kind = 'none') / max(value) filter (where kind = 'batch')) as ratio
    from landscape_readings
    where whole and lr = 0.1 and reading = 'early_change' and value > 0
    group by seed
),

-- one row
over_seeds as (
    select avg(ratio) as mean, count(ratio) as n, stddev_samp(ratio) / sqrt(count(ratio)) as error
    from by_seed
)

select said_by, exp(mean) as measured, n, exp(mean - t95 * error) as low, exp(mean + t95 * error) as high
from over_seeds
left join student using (n)
cross join (values ('text'), ('figure')) as sources (said_by)

-- name: smoother_than_standard
-- One row per norm and reading at rate 0.1: without norm over with it, geometric mean over seeds.
with
-- one row per norm, reading and seed
by_seed as (
    select one.kind, reading, seed, ln(other.value / one.value) as ratio
    from landscape_readings as one
    join landscape_readings as other using (reading, seed, lr)
    where lr = 0.1 and other.kind = 'none' and one.kind <> 'none' and one.value > 0 and other.value > 0
),

-- one row per norm and reading
over_seeds as (
    select kind, reading, avg(ratio) as mean, count(*) as n, stddev_samp(ratio) / sqrt(count(*)) as error
    from by_seed
    group by kind, reading
)

select kind, reading, exp(mean) as measured, n, exp(mean - t95 * error) as low, exp(mean + t95 * error) as high
from over_seeds
left join student using (n)
where n >= (select seeds from enough)
order by kind, reading

-- name: learning
-- One row per trial at rate 0.1: its steps until five mini-batch readings in a row have a mean of 95 %, or all where they never
-- have.
select trial, kind, seed, coalesce(reached, steps) as until
from reaching
where level = 0.95 and lr = 0.1

-- name: while_learning
-- One row per norm and reading at rate 0.1, over the readings of a network until it has 95 % of a mini-batch right: range of
-- the loss and change of the gradient along it, median without norm over that with this one; length of covariate shift, with
-- it over without, geometric mean over the layers but the second, and by how much its mean cosine is higher. Geometric means,
-- of the cosine means, over seeds in which each has six readings by then.
with
-- one row per norm, seed and reading of the landscape
landscapes as (
    select kind, seed, median(variation) as variation, median(largest_change) as change
    from along_the_gradient
    join learning using (trial, kind, seed)
    where step <= until
    group by kind, seed
    having count(*) >= 6
),

-- one row per norm, seed and layer
shifts as (
    select kind, seed, layer_index, avg(ln(least(l2, 1e30))) as l2, avg(cosine) as cosine
    from covariate_shift
    join learning using (trial)
    where step <= until and l2 > 0 and layer_index > 2
    group by kind, seed, layer_index
    having count(*) >= 6
),

-- one row per norm, seed and reading
by_seed as (
    select other.kind, seed, 'variation' as reading, ln(nullif(one.variation, 0) / nullif(other.variation, 0)) as x
    from landscapes as one
    join landscapes as other using (seed)
    where one.kind = 'none' and other.kind <> 'none'
    union all
    select other.kind, seed, 'change' as reading, ln(nullif(one.change, 0) / nullif(other.change, 0)) as x
    from landscapes as one
    join landscapes as other using (seed)
    where one.kind = 'none' and other.kind <> 'none'
    union all
    select other.kind, seed, reading, avg(if(reading = 'shift', other.l2 - one.l2, other.cosine - one.cosine)) as x
    from shifts as one
    join shifts as other using (seed, layer_index)
    cross join (values ('shift'), ('cosine')) as readings (reading)
    where one.kind = 'none' and other.kind <> 'none'
    group by other.kind, seed, reading
),

-- one row per norm and reading
over_seeds as (
    select kind, reading, avg(x) as mean, count(x) as n, stddev_samp(x) / sqrt(count(x)) as error
    from by_seed
    group by kind, reading
)

select
    kind,
    reading,
    if(reading = 'cosine', mean, exp(mean)) as measured,
    n,
    if(reading = 'cosine', mean - t95 * error, exp(mean - t95 * error)) as low,
    if(reading = 'cosine', mean + t95 * error, exp(mean + t95 * error)) as high
from over_seeds
left join student using (n)
where n >= (select seeds from enough)
order by kind, reading

-- name: beta_times_rate
-- One row per norm and rate: median over the training of the effective beta, times half the rate: 1 where beta is 2 / rate.
-- Geometric mean over seeds.
with
-- one row per norm and rate
over_seeds as (
    select
        kind,
        lr,
        avg(ln(beta * lr / 2)) as mean,
        count(*) as n,
        stddev_samp(ln(beta * lr / 2)) / sqrt(count(*)) as error
    from landscape_by_trial
    where beta > 0
    group by kind, lr
)

select kind, lr, exp(mean) as measured, n, exp(mean - t95 * error) as low, exp(mean + t95 * error) as high
from over_seeds
left join student using (n)
order by kind, lr

-- name: two_over_rate
-- The same, for the claims.
select kind, lr, measured, n, low, high
from beta_times_rate
where n >= (select seeds from enough)
order by kind, lr

-- name: beta_by_step_size
-- One row per norm that the paper compares and multiple of the rate, at rate 0.1: effective beta, median over the training,
-- geometric mean over seeds.
with
-- one row per trial and step size
by_trial as (
    select trial, multiple, median(least(beta, 1e30)) as beta
    from landscape
    group by trial, multiple
)

select kind, multiple, exp(avg(ln(beta))) as beta, count(*) as n
from by_trial
join settings using (trial)
where kind in ('none', 'batch') and lr = 0.1 and beta > 0
group by kind, multiple
order by kind, multiple

-- name: change_over_step_sizes
-- One row per norm at rate 0.1: largest change of the gradient over the step sizes, over the least, median over the training,
-- geometric mean over seeds.
with
-- one row per trial
by_trial as (
    select kind, seed, median(largest_change / least_change) as ratio
    from along_the_gradient
    where lr = 0.1 and least_change > 0
    group by kind, seed
),

-- one row per norm
over_seeds as (
    select kind, avg(ln(ratio)) as mean, count(*) as n, stddev_samp(ln(ratio)) / sqrt(count(*)) as error
    from by_trial
    group by kind
)

select kind, exp(mean) as measured, n, exp(mean - t95 * error) as low, exp(mean + t95 * error) as high
from over_seeds
left join student using (n)
where n >= (select seeds from enough)
order by kind

-- --- Theorem 4.1 ----------------------------------------------------------------------------------------------------

-- name: sides_of_the_theorem
-- One row per trial, step, unit and gradient on the right side: the left side over the right. Infinite where only the right is
-- 0, as of a channel that is dead once its norm is left out: the theorem does not hold there. A unit without a gradient, 0 on
-- both sides, has no ratio.
with
-- one row per trial, step, unit and gradient
sides as (
    select
        trial,
        seed,
        gradient_bound.step,
        layer_index,
        unit,
        gradient,
        "left" as l,
        if(gradient = 'at the layer''s output', "right", plain_right) as r
    from gradient_bound
    join settings using (trial)
    cross join (values ('at the layer''s output'), ('without this norm')) as gradients (gradient)
)

select trial, seed, step, layer_index, unit, gradient, if(r > 0, l / r, 'infinity'::double) as ratio
from sides
where r is not null and (l > 0 or r > 0)

-- name: theorem_by_layer
-- One row per layer and gradient: median and 90 % range of the ratio over units, steps, rates and seeds.
select
    gradient,
    layer_index,
    median(ratio) as ratio,
    quantile_cont(ratio, 0.05) as p5,
    quantile_cont(ratio, 0.95) as p95,
    avg((ratio <= 1.001)::int) as holds,
    count(*) as units
from sides_of_the_theorem
group by gradient, layer_index
order by gradient, layer_index

-- name: theorem_holds
-- One row per gradient on the right side: share of units for which the left side is no larger, but for rounding (a thousandth),
-- over seeds.
with
-- one row per gradient and seed
by_seed as (
    select gradient, seed, avg((ratio <= 1.001)::int) as share
    from sides_of_the_theorem
    group by gradient, seed
),

-- one row per gradient
over_seeds as (
    select gradient, avg(share) as measured, count(*) as n, stddev_samp(share) / sqrt(count(*)) as error
    from by_seed
    group by gradient
)

select
    gradient,
    measured,
    n,
    if(n > 1, greatest(0, measured - t95 * error), null) as low,
    if(n > 1, least(1, measured + t95 * error), null) as high
from over_seeds
left join student using (n)
where n >= (select seeds from enough)
order by gradient

-- name: theorem_is_an_identity
-- One row: share of units for which both sides agree to a hundredth, with the gradient at the layer's output; over seeds.
with
-- one row per seed
by_seed as (
    select seed, avg((abs(ratio - 1) <= 0.01)::int) as share
    from sides_of_the_theorem
    where gradient = 'at the layer''s output'
    group by seed
),

-- one row
over_seeds as (
    select avg(share) as measured, count(*) as n, stddev_samp(share) / sqrt(count(*)) as error
    from by_seed
)

select
    measured,
    n,
    if(n > 1, greatest(0, measured - t95 * error), null) as low,
    if(n > 1, least(1, measured + t95 * error), null) as high
from over_seeds
left join student using (n)
where n >= (select seeds from enough)
