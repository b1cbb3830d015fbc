-- Queries of studies/deep_linear.py. Three tables are not the store's: `plan` has one row per trial of the preset; `chosen`
-- one row per trial with a result; `student` the 97.5 % quantile t95 of Student's t for n readings. A query that selects
-- from another of this file gets it as a CTE.
--
-- What left the float32 numbers is +inf in the store. Medians, quantiles and maxima go over it as over any large number;
-- where a claim is judged by them it counts as 1e30. Means are of logarithms of numbers that are finite and above 0; `n` counts those.

-- name: networks
-- One row per trial of a deep linear network with a result: `rate` is its rate in words, `papers` whether its numbers can be
-- held against the paper's up to its last step, and `whole` whether over the paper's 10,000 steps. A norm and rate with
-- several trials a seed, because another field was given several values, is left out: these are no repeats.
select
    trial,
    seed,
    norm,
    lr,
    'LR ' || replace(printf('%g', lr), 'e-0', 'e−') as rate,
    steps,
    width,
    outcome,
    depth = 25
    and width = 10
    and batch = 1000
    and norm_batch = batch
    and trainable = 'all'
    and weight_init = 'glorot_uniform'
    and placement = if(norm = 'none', 'none', 'every')
    and norm_init = 'ones'
    and affine = 'both'
    and affine_at = if(norm = 'none', 'none', 'every')
    and momentum = 0
    and weight_decay = 0
    and coalesce(norm_decay, 0) = 0
    and gamma_l1 + gamma_l2 + beta_l1 + beta_l2 = 0
    and warmup = 0
    and len(milestones) = 0
    and plateau is null
    and precision = 'fp32' as papers,
    papers and steps = 10000 and outcome = 'finished' as whole
from chosen
join trials using (trial)
where network = 'linear' and data = 'linear_teacher'
qualify count(*) over (partition by norm, lr, seed) = 1
order by norm, lr, seed

-- name: first_seed
-- One row per norm and rate: the trial of its first seed, for pictures of one network, which is what the paper shows.
select norm, lr, rate, arg_min(trial, seed) as trial
from networks
group by norm, lr, rate

-- --- Figure 3b, left: the loss ---------------------------------------------------------------------------------------

-- name: loss_over_training
-- One row per rate, norm and step: half the squared error added up over the 1,000 vectors, geometric mean over the seeds
-- with their range.
select
    networks.rate as panel,
    networks.norm,
    batch_curve.step,
    exp(avg(ln(loss)) filter (where isfinite(loss) and loss > 0)) as loss,
    min(loss) as minimum,
    max(loss) as maximum,
    count(*) as n
from batch_curve
join networks using (trial)
group by networks.lr, networks.rate, networks.norm, batch_curve.step
order by networks.lr desc, networks.norm, batch_curve.step

-- name: spectrum
-- One row per number of directions: half the squared error that the best linear map of 1,000 vectors leaves when it lacks the
-- teacher's so many weakest directions. That is half the sum of as many smallest squared singular values of the teacher's
-- outputs, 1,000 by 10. Computed once in float64 from the one teacher and vectors of this project; tests compute it anew.
select directions, loss::double as loss
from (
    values
    (0, 0.0),
    (1, 2.3),
    (2, 134.7),
    (3, 911.1),
    (4, 2797.4),
    (5, 5973.0),
    (6, 9529.2),
    (7, 16441.8),
    (8, 24370.7),
    (9, 36618.5),
    (10, 52878.8)
) as sums (directions, loss)

-- name: directions_over_training
-- One row per rate, norm and step: how many of the teacher's ten directions the loss of the first seed says are left to learn:
-- a whole number at a saddle, linear in the loss between two. Above the loss of a map to zero there are ten.
with
-- one row per number of directions: from its loss up to the next
intervals as (
    select directions, loss as here, coalesce(lead(loss) over (order by directions), 'inf'::double) as next
    from spectrum
)

select
    first_seed.rate as panel,
    first_seed.norm,
    batch_curve.step,
    if(isfinite(next), directions + (loss - here) / (next - here), 10) as directions_left
from batch_curve
join first_seed using (trial)
join networks using (trial)
join intervals on loss >= here and loss < next
where isfinite(loss) and width = 10
order by first_seed.lr desc, first_seed.norm, batch_curve.step

-- name: last_losses
-- One row per rate and norm: the loss after the last update of whatever was trained, geometric mean over the seeds that
-- finished, with their range.
select
    networks.rate,
    norm,
    exp(avg(ln(loss))) as loss,
    min(loss) as minimum,
    max(loss) as maximum,
    count(*) as n,
    networks.steps
from batch_curve
join networks using (trial)
where batch_curve.step = networks.steps and isfinite(loss) and loss > 0
group by networks.lr, networks.rate, norm, networks.steps
qualify networks.steps = max(networks.steps) over ()
order by networks.lr desc, norm

-- name: losses
-- One row per norm, rate and place (start, end): the loss before the first update, or after the last of 10,000; over seeds.
-- Trials that diverged, or trained shorter or longer than the paper's, have no end.
with
-- one row per trial and place
by_trial as (
    select
        trial,
        if(batch_curve.step = 0, 'start', 'end') as place,
        ln(any_value(loss)) as x
    from batch_curve
    join networks using (trial)
    where
        (batch_curve.step = 0 and papers or batch_curve.step = networks.steps and whole)
        and isfinite(loss)
        and loss > 0
    group by trial, place
),

-- one row per norm, rate and place
over_seeds as (
    select norm, lr, place, avg(x) as mean, count(x) as n, stddev_samp(x) / sqrt(count(x)) as error
    from by_trial
    join networks using (trial)
    group by norm, lr, place
)

select norm, lr, place, exp(mean) as measured, n, exp(mean - t95 * error) as low, exp(mean + t95 * error) as high
from over_seeds
left join student using (n)
order by lr desc, norm, place

-- name: times_less_loss
-- One row per rate: how many times less loss batch norm ends with than no norm, over seeds.
with
-- one row per rate and seed
by_seed as (
    select
        lr,
        seed,
        ln(max(loss) filter (where norm = 'none')) - ln(max(loss) filter (where norm = 'batch')) as x
    from batch_curve
    join (select trial, norm, lr, seed, steps as last from networks where norm in ('none', 'batch')) using (trial)
    where step = last and isfinite(loss) and loss > 0
    group by lr, seed
),

-- one row per rate
over_seeds as (
    select lr, avg(x) as mean, count(x) as n, stddev_samp(x) / sqrt(count(x)) as error
    from by_seed
    group by lr
)

select lr, exp(mean) as measured, n, exp(mean - t95 * error) as low, exp(mean + t95 * error) as high
from over_seeds
left join student using (n)
order by lr desc

-- name: times_the_loss_of_batch_norm
-- One row per norm other than batch norm, rate and reading: its loss over that of batch norm from the same weights, at the
-- end ('end') and as a geometric mean over the steps after the first ('on the way'); over the n seeds that have both.
with
-- one row per trial and step after the first
readings as (
    select norm, lr, seed, step, step = last as at_end, ln(loss) as x
    from batch_curve
    join (select trial, norm, lr, seed, steps as last from networks) using (trial)
    where step > 0 and isfinite(loss) and loss > 0
),

-- one row per norm, rate and seed
by_seed as (
    select
        other.norm,
        other.lr,
        other.seed,
        avg(other.x - batch.x) as on_the_way,
        max(other.x - batch.x) filter (where other.at_end) as at_end
    from readings as other
    join readings as batch on batch.lr = other.lr and batch.seed = other.seed and batch.step = other.step
    where other.norm != 'batch' and batch.norm = 'batch'
    group by all
),

-- one row per norm, rate and reading
over_seeds as (
    select norm, lr, reading, avg(x) as mean, count(x) as n, stddev_samp(x) / sqrt(count(x)) as error
    from (
        select norm, lr, 'end' as reading, at_end as x from by_seed
        union all
        select norm, lr, 'on the way', on_the_way from by_seed
    ) as both_readings
    group by norm, lr, reading
)

select norm, lr, reading, exp(mean) as measured, n, exp(mean - t95 * error) as low, exp(mean + t95 * error) as high
from over_seeds
left join student using (n)
order by lr desc, norm, reading

-- --- Figure 3b, right: internal covariate shift ------------------------------------------------------------------------

-- name: shift_over_training
-- One row per layer, rate, norm and step: |G - G'|, first seed.
select panel, norm, step, l2
from shift_of_first_seed

-- name: turn_over_training
-- One row per layer, rate, norm and step: the cosine between G and G', first seed.
select panel, norm, step, cosine
from shift_of_first_seed

-- name: shift_of_first_seed
-- One row per layer that the paper shows, rate, norm that it compares and step: covariate shift of the first seed.
select
    'layer ' || layer_index || ', ' || rate as panel,
    norm,
    step,
    l2,
    cosine
from covariate_shift
join first_seed using (trial)
where layer_index in (9, 17) and norm in ('none', 'batch') and lr in (1e-6, 1e-7)
order by layer_index, lr desc, norm, step

-- name: shift_of_trials
-- One row per trial and layer, over training: x, the logarithm of the geometric mean of |G - G'|; r, that of |G - G'| in
-- units of |G|; y, the mean cosine between G and G'.
select
    trial,
    layer_index,
    avg(ln(l2)) filter (where isfinite(l2) and l2 > 0) as x,
    avg(ln(l2 / before)) filter (where isfinite(l2) and isfinite(before) and l2 > 0 and before > 0) as r,
    avg(cosine) as y
from covariate_shift
group by trial, layer_index

-- name: shift_by_layer
-- One row per rate, norm and layer: over training, the geometric mean of |G - G'| and the mean cosine between G and G'; of
-- each the median over seeds, from the least to the greatest: seeds lie decades apart, and means over three of them tell of
-- the odd one.
with
-- one row per norm, rate and layer
over_seeds as (
    select
        norm,
        lr,
        rate,
        layer_index,
        bool_and(whole) as whole,
        count(x) as n,
        median(x) as middle_x,
        min(x) as least_x,
        max(x) as most_x,
        median(y) as middle_y,
        min(y) as least_y,
        max(y) as most_y
    from shift_of_trials
    join networks using (trial)
    group by norm, lr, rate, layer_index
)

select
    rate as panel,
    norm,
    lr,
    layer_index,
    whole,
    n,
    exp(middle_x) as l2,
    if(n > 1, exp(least_x), null) as l2_low,
    if(n > 1, exp(most_x), null) as l2_high,
    middle_y as cosine,
    if(n > 1, least_y, null) as cosine_low,
    if(n > 1, most_y, null) as cosine_high
from over_seeds
order by lr desc, norm, layer_index

-- name: size_of_shift
-- One row per rate, norm and layer: the geometric mean of |G - G'| over training, median over seeds with their range.
select panel, norm, layer_index, l2, l2_low as minimum, l2_high as maximum, n
from shift_by_layer

-- name: turn_of_shift
-- One row per rate, norm and layer: the mean cosine between G and G' over training, median over seeds with their range.
select panel, norm, layer_index, cosine, cosine_low as minimum, cosine_high as maximum, n
from shift_by_layer

-- name: shift
-- One row per rate, norm, layer and reading (l2, cosine), of the paper's own training.
select norm, lr, layer_index, 'l2' as reading, l2 as measured, n, l2_low as low, l2_high as high
from shift_by_layer
where whole
union all
select norm, lr, layer_index, 'cosine', cosine, n, cosine_low, cosine_high
from shift_by_layer
where whole

-- name: shift_with_and_without
-- One row per rate and reading: batch norm against no norm from the same weights, in the layer looked at where the reading
-- favours batch norm most; median over the seeds that have both, from the least to the greatest. 'l2': |G - G'| with batch
-- norm over that without, least; 'relative': the same in units of |G|; 'cosine': its cosine less that without, greatest.
with
-- one row per trial and layer
readings as (
    select norm, lr, seed, layer_index, x, r, y
    from shift_of_trials
    join networks using (trial)
),

-- one row per rate and seed
by_seed as (
    select
        lr,
        seed,
        exp(min(batch.x - none.x)) as l2,
        exp(min(batch.r - none.r)) as relative,
        max(batch.y - none.y) as cosine
    from readings as batch
    join readings as none using (lr, seed, layer_index)
    where batch.norm = 'batch' and none.norm = 'none'
    group by lr, seed
),

-- one row per rate, seed and reading
pairs as (
    select
        lr,
        reading,
        case reading when 'l2' then l2 when 'relative' then relative else cosine end as x
    from by_seed
    cross join (values ('l2'), ('relative'), ('cosine')) as readings_of_shift (reading)
)

select
    lr,
    reading,
    median(x) as measured,
    count(x) as n,
    if(count(x) > 1, min(x), null) as low,
    if(count(x) > 1, max(x), null) as high
from pairs
group by lr, reading
order by lr desc, reading

-- --- Figure 10: the landscape --------------------------------------------------------------------------------------------

-- name: ways
-- One row per trial and step: over the step sizes along the gradient, the range of the loss, the range of the gradient's
-- change, and the effective beta, which is the largest over them; beside them the gradient's change at the trial's own rate,
-- the largest beta at steps of that rate or longer, and beta at the shortest step.
select
    trial,
    landscape.step,
    any_value(loss_before) as loss,
    min(landscape.loss) as loss_least,
    max(landscape.loss) as loss_most,
    arg_min(gradient_change, abs(ln(multiple))) as change,
    min(gradient_change) as change_least,
    max(gradient_change) as change_most,
    max(beta) as beta,
    max(beta) filter (where multiple > 0.99) as beta_from_the_rate,
    arg_min(beta, multiple) as beta_at_shortest
from landscape
group by trial, landscape.step

-- name: ways_of_first_seed
-- One row per rate, norm and step: the same, of one network a norm and rate. A panel is a rate.
select
    rate as panel,
    case norm when 'l1' then 'l_1' when 'l2' then 'l_2' when 'linf' then 'l_inf' else norm end
    || ', ' || rate as norm_panel,
    norm,
    lr,
    ways.*
from ways
join first_seed using (trial)
where lr in (1e-6, 1e-7)
order by lr desc, norm, step

-- name: loss_along_updates
-- One row per rate, norm that the paper compares and step: range of the loss over step sizes, first seed.
select panel, norm, step, loss, loss_least as least, loss_most as most
from ways_of_first_seed
where norm in ('none', 'batch')

-- name: gradient_along_updates
-- One row per rate, norm that the paper compares and step: range of |g(x) - g(x')| over step sizes, first seed.
select panel, norm, step, change, change_least as least, change_most as most
from ways_of_first_seed
where norm in ('none', 'batch')

-- name: beta_along_updates
-- One row per rate, norm that the paper compares and step: effective beta, first seed.
select panel, norm, step, beta
from ways_of_first_seed
where norm in ('none', 'batch')

-- name: loss_along_updates_of_l_p
-- One row per l_p norm, rate and step: range of the loss over step sizes, first seed.
select norm_panel, norm, step, loss, loss_least as least, loss_most as most
from ways_of_first_seed
where norm in ('l1', 'l2', 'linf')

-- name: gradient_along_updates_of_l_p
-- One row per l_p norm, rate and step: range of |g(x) - g(x')| over step sizes, first seed.
select norm_panel, norm, step, change, change_least as least, change_most as most
from ways_of_first_seed
where norm in ('l1', 'l2', 'linf')

-- name: beta_along_updates_of_l_p
-- One row per rate, norm and step: effective beta with batch and l_p norms, first seed.
select panel, norm, step, beta
from ways_of_first_seed
where norm in ('batch', 'l1', 'l2', 'linf')

-- name: over_a_training
-- One row per trial and quantity: median and maximum over its steps. Quantities: 'loss range' (greatest less least over the
-- step sizes), 'loss' and 'gradient difference' (their greatest) and 'beta'. With an overflow the maximum is +inf.
with
-- one row per trial, step and quantity
readings as (
    select trial, 'loss range' as quantity, if(isfinite(loss_most), loss_most - loss_least, loss_most) as x from ways
    union all
    select trial, 'loss', loss_most from ways
    union all
    select trial, 'gradient difference', change_most from ways
    union all
    select trial, 'beta', beta from ways
)

select trial, quantity, median(x) as middle, max(x) as most, count(x) as readings
from readings
group by trial, quantity

-- name: extremes
-- One row per norm, rate, quantity and statistic ('median' or 'maximum' over a training): of the paper's own training, the
-- median over seeds, from the least to the greatest. What overflowed counts as 1e30, which no band holds.
with
-- one row per trial, quantity and statistic
statistics as (
    select trial, quantity, 'median' as statistic, least(middle, 1e30) as x from over_a_training
    union all
    select trial, quantity, 'maximum', least(most, 1e30) from over_a_training
)

select
    norm,
    lr,
    quantity,
    statistic,
    median(x) as measured,
    count(x) as n,
    if(count(x) > 1, min(x), null) as low,
    if(count(x) > 1, max(x), null) as high
from statistics
join networks using (trial)
where whole
group by norm, lr, quantity, statistic
order by lr desc, norm, quantity, statistic

-- name: times_smoother
-- One row per rate, quantity and statistic: without norms over with batch norm, median over the seeds that have both, from
-- the least to the greatest. What overflowed counts as 1e30; where both did, the seed says nothing.
with
-- one row per rate, seed, quantity and statistic
pairs as (
    select
        none.lr,
        none.seed,
        without.quantity,
        statistic,
        if(statistic = 'median', without.middle, without.most) as bare,
        if(statistic = 'median', normed.middle, normed.most) as normed
    from networks as none
    join networks as batch on batch.lr = none.lr and batch.seed = none.seed
    join over_a_training as without on without.trial = none.trial
    join over_a_training as normed on normed.trial = batch.trial and normed.quantity = without.quantity
    cross join (values ('median'), ('maximum')) as statistics (statistic)
    where none.norm = 'none' and batch.norm = 'batch'
),

-- one row per rate, seed, quantity and statistic
by_seed as (
    select lr, quantity, statistic, least(bare, 1e30) / least(normed, 1e30) as x
    from pairs
    where isfinite(bare) or isfinite(normed)
)

select
    lr,
    quantity,
    statistic,
    median(x) as measured,
    count(x) as n,
    if(count(x) > 1, min(x), null) as low,
    if(count(x) > 1, max(x), null) as high
from by_seed
group by lr, quantity, statistic
order by lr desc, quantity, statistic

-- --- 2 / LR --------------------------------------------------------------------------------------------------------------

-- name: plateau
-- One row per norm, rate and reading: median over the second half of a training, in units of 2 / LR, of the largest beta over
-- every step size, which is the paper's, over those from LR on, and of that at the shortest step. Where the sharpness is far
-- below 2 / LR, what a gradient changes by over LR / 100, or LR / 10, is float32's rounding, and the largest over all step
-- sizes is that rounding over the shortest length. Geometric mean over seeds with a 95 % interval.
with
-- one row per trial and reading
by_trial as (
    select
        trial,
        reading,
        ln(median(
            lr / 2 * case reading
                when 'every step size' then beta
                when 'steps from LR on' then beta_from_the_rate
                else beta_at_shortest
            end
        )) as x
    from ways
    join networks using (trial)
    cross join (values ('every step size'), ('steps from LR on'), ('the shortest step')) as readings (reading)
    where ways.step * 2 >= networks.steps
    group by trial, reading
),

-- one row per norm, rate and reading
over_seeds as (
    select
        norm,
        lr,
        reading,
        avg(x) as mean,
        count(x) as n,
        stddev_samp(x) / sqrt(count(x)) as error
    from by_trial
    join networks using (trial)
    where isfinite(x)
    group by norm, lr, reading
)

select
    norm,
    lr,
    reading,
    exp(mean) as measured,
    n,
    exp(mean - t95 * error) as low,
    exp(mean + t95 * error) as high
from over_seeds
left join student using (n)
order by lr desc, norm, reading

-- name: two_over_lr
-- One row per norm and rate for each of three readings of beta, in units of 2 / LR: `plateau` as a figure draws it.
select reading, norm, lr, measured, low, high
from plateau
order by reading, norm, lr

-- name: beta_by_step_size
-- One row per rate, norm and step size: median of beta over the second half of the trainings, in units of 2 / LR.
select
    networks.rate as panel,
    networks.norm,
    round(multiple, 4) as times,
    median(beta * networks.lr / 2) as beta,
    count(*) as readings
from landscape
join networks using (trial)
where landscape.step * 2 >= networks.steps
group by networks.lr, networks.rate, networks.norm, times
order by networks.lr desc, networks.norm, times

-- name: growth_of_gradient_difference
-- One row per norm and rate: the gradient's largest change over step sizes over its least, the edges of figure 10b, of the
-- paper's own training; median over training, geometric mean over seeds. The step sizes themselves span 3,162.
with
-- one row per trial
by_trial as (
    select trial, ln(median(change_most / change_least)) as x
    from ways
    where change_least > 0
    group by trial
),

-- one row per norm and rate
over_seeds as (
    select norm, lr, avg(x) as mean, count(x) as n, stddev_samp(x) / sqrt(count(x)) as error
    from by_trial
    join networks using (trial)
    where isfinite(x) and whole
    group by norm, lr
)

select norm, lr, exp(mean) as measured, n, exp(mean - t95 * error) as low, exp(mean + t95 * error) as high
from over_seeds
left join student using (n)
order by lr desc, norm

-- --- Theorem 4.1 ---------------------------------------------------------------------------------------------------------

-- name: sides_of_the_bound
-- One row per trial, unit of a batch norm layer, step and right side.
select trial, bound.step, 'gradient at the output' as side, bound."left" as l, bound."right" as r
from gradient_bound as bound
union all
select trial, bound.step, 'without this norm', bound."left", bound.plain_right
from gradient_bound as bound

-- name: bound_over_training
-- One row per rate, step and right side: share of the units of all batch norm layers for which the left side is at most the
-- right one (a thousandth above it counts as rounding), over all seeds.
select
    rate as panel,
    side,
    sides_of_the_bound.step,
    avg((l <= 1.001 * r)::int) as holds,
    count(r) as units
from sides_of_the_bound
join networks using (trial)
where r is not null
group by lr, rate, side, sides_of_the_bound.step
order by lr desc, side, sides_of_the_bound.step

-- name: bound_by_unit
-- One row per rate, step and right side: left over right, median over units and seeds with the middle 90 %.
select
    rate as panel,
    side,
    sides_of_the_bound.step,
    median(l / r) as ratio,
    quantile_cont(l / r, 0.05) as "5 %",
    quantile_cont(l / r, 0.95) as "95 %",
    count(*) as units
from sides_of_the_bound
join networks using (trial)
where r > 0
group by lr, rate, side, sides_of_the_bound.step
order by lr desc, side, sides_of_the_bound.step

-- name: bound
-- One row per rate, place and question, mean over seeds of the share of units. 'equal': left over right, with the gradient
-- at the layer's output, within a hundredth of 1; 'bounded': left at most right and a thousandth for rounding, with that
-- in the network without this norm. Places:
-- 'start', before the first update, and 'on the way', all readings after it. A mean that is a band's end may round to either
-- side of it: it is rounded to the band's.
with
-- one row per trial, place and question
by_trial as (
    select
        trial,
        if(bound.step = 0, 'start', 'on the way') as place,
        question,
        avg(if(
            question = 'equal', (abs(bound."left" - bound."right") <= 0.01 * bound."right")::int,
            (bound."left" <= 1.001 * bound.plain_right)::int
        )) as x
    from gradient_bound as bound
    cross join (values ('equal'), ('bounded')) as questions (question)
    group by trial, place, question
),

-- one row per rate, place and question
over_seeds as (
    select lr, place, question, round(avg(x), 9) as mean, count(x) as n, stddev_samp(x) / sqrt(count(x)) as error
    from by_trial
    join networks using (trial)
    group by lr, place, question
)

select
    lr,
    place,
    question,
    mean as measured,
    n,
    if(n > 1, greatest(0, mean - t95 * error), null) as low,
    if(n > 1, least(1, mean + t95 * error), null) as high
from over_seeds
left join student using (n)
order by lr desc, place, question

-- --- Distributions -------------------------------------------------------------------------------------------------------

-- name: distributions
-- One row per norm, time and interval: density of what layer 17 hands on, as the share in a tenth of a standard
-- deviation, by the distance from its mean in standard deviations; at the larger of the paper's rates, first seed.
select
    case first_seed.norm
        when 'none' then 'no norm' when 'batch' then 'batch norm' when 'l1' then 'l_1' when 'l2' then 'l_2' else 'l_inf'
    end as panel,
    if(histogram.step = 0, 'start', 'end') as time,
    (histogram.low - activations.mean) / activations.sd as low,
    (histogram.high - activations.mean) / activations.sd as high,
    0.1 * histogram.count / histogram."values" / ((histogram.high - histogram.low) / activations.sd) as share
from activation_histogram as histogram
join activations using (trial, step, layer_index, place)
join first_seed using (trial)
join (select trial, steps as last from networks) using (trial)
where
    place = 'output'
    and histogram.layer_index = 17
    and first_seed.lr = 1e-6
    and histogram.step in (0, last)
    and activations.sd > 0
order by
    case norm when 'none' then 0 when 'batch' then 1 else 2 end,
    norm,
    histogram.step,
    histogram.low
